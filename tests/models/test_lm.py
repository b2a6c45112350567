"""The language model: its options, its counts, and that it looks only backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import schema
from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.models import lm

VOCAB, LENGTH = 17, 11
GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu",
    "use_bias": True,
    "tie_embeddings": True,
}


def make(**changes) -> lm.LM:
    given = {
        "num_layers": 2,
        "embed_dim": 24,
        "num_heads": 2,
        "max_len": 16,
        "init_std": 0.2,
        **changes,
    }
    return lm.LM(schema.build(lm.Config, lm.resolve(given)), VOCAB)


def tokens(seed: int = 0, rows: int = 2):
    draw = np.random.default_rng(seed).integers(0, VOCAB, (rows, LENGTH))
    return jnp.asarray(draw, jnp.int32)


def context(**fields) -> Context:
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    return Context(**{"positions": positions, **fields})


def logits(model: lm.LM, ids=None, ctx=None, params=None, seed=0):
    start, buffers = jax.jit(model.init)(seed)

    @jax.jit
    def forward(params, ids, ctx):
        hidden, _ = model.hidden(params, buffers, ids, ctx)
        return model.logits(params, hidden)

    ids = tokens() if ids is None else ids
    return forward(params or start, ids, ctx or context())


@pytest.mark.parametrize("options", [GPT2, {"num_kv_heads": 1, "qk_norm": True}])
def test_output_ignores_future_tokens(options):
    model = make(**options)
    ids = tokens()
    changed = ids.at[:, 6].set((ids[:, 6] + 1) % VOCAB)
    before, after = logits(model, ids), logits(model, changed)
    np.testing.assert_allclose(before[:, :6], after[:, :6], atol=1e-5)
    assert np.abs(before[:, 6:] - after[:, 6:]).max() > 1e-3


def test_packed_documents_give_what_they_give_alone():
    model = make()
    ids, cut = tokens(), 4
    segments = jnp.where(jnp.arange(LENGTH) < cut, 1, 2) * jnp.ones((2, 1), jnp.int32)
    positions = jnp.where(segments == 1, jnp.arange(LENGTH), jnp.arange(LENGTH) - cut)
    packed = logits(model, ids, context(segment_ids=segments, positions=positions))
    rolled = jnp.roll(ids, -cut, axis=1)
    alone = logits(model, rolled)
    np.testing.assert_allclose(packed[:, cut:], alone[:, : LENGTH - cut], atol=2e-5)
    assert np.abs(logits(model, ids)[:, cut:] - packed[:, cut:]).max() > 1e-3


def test_nanogpt_has_its_published_number_of_parameters():
    given = {**GPT2, "use_bias": False, "num_layers": 4, "embed_dim": 128}
    given |= {"num_heads": 4, "max_len": 64}
    model = lm.LM(schema.build(lm.Config, lm.resolve(given)), 65)
    layer = 4 * 128**2 + 2 * 4 * 128**2 + 2 * 128
    assert model.parameter_count() == 4 * layer + (65 + 64 + 1) * 128 == 804096


def test_gpt2_small_has_124_million_parameters():
    given = {**GPT2, "num_layers": 12, "embed_dim": 768, "num_heads": 12}
    model = lm.LM(schema.build(lm.Config, lm.resolve(given)), 50257)
    assert model.parameter_count() == 124_439_808


def test_llama_3_8b_has_its_published_number_of_parameters():
    given = {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8}
    given |= {"mlp_dim": 14336}
    model = lm.LM(schema.build(lm.Config, lm.resolve(given)), 128256)
    assert model.parameter_count() == 8_030_261_248


@pytest.mark.parametrize("options", [{}, GPT2], ids=["llama", "gpt2"])
def test_flops_agree_with_the_compiler(options):
    model = make(embed_dim=64, num_heads=2, unroll="all", remat="none", **options)
    params, buffers = jax.eval_shape(model.init, 0)

    def forward(params, ids):
        hidden, _ = model.hidden(params, buffers_now, ids, context())
        return model.logits(params, hidden)

    buffers_now = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), buffers)
    compiled = jax.jit(forward).lower(params, tokens()).compile()
    counted = compiled.cost_analysis()["flops"]
    assert 2 * model.flops(LENGTH) == pytest.approx(counted, rel=0.2)


def test_tied_head_is_the_token_table():
    model = make(tie_embeddings=True)
    params, _ = jax.jit(model.init)(0)
    assert "head" not in params
    hidden = jax.random.normal(jax.random.key(1), (3, 24))
    np.testing.assert_allclose(
        model.logits(params, hidden),
        hidden @ params["token_embedding"]["table"].T,
        atol=1e-5,
    )


def test_soft_cap_bounds_the_logits():
    plain, capped = logits(make()), logits(make(logits_soft_cap=2.0))
    np.testing.assert_allclose(capped, 2 * np.tanh(plain / 2), atol=1e-5)


def test_embeddings_can_be_scaled():
    plain, scaled = make(), make(embed_scale=3.0)
    params, _ = jax.jit(plain.init)(0)
    ids, positions = tokens(), context().positions
    np.testing.assert_allclose(
        scaled.embed(params, ids, positions),
        3 * plain.embed(params, ids, positions),
        rtol=1e-6,
    )


def test_residual_scale_of_zero_leaves_the_embeddings():
    model = make(residual_scale=0.0)
    params, buffers = jax.jit(model.init)(0)
    hidden, _ = model.hidden(params, buffers, tokens(), context())
    x = model.embed(params, tokens(), context().positions)
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def test_dropout_depends_on_the_key_and_only_in_training():
    model = make(dropout=0.5)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    first, again, other = (
        logits(model, ctx=context(train=True, prng_key=key)) for key in keys
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_allclose(logits(model), logits(make()), atol=1e-6)


def test_bfloat16_computes_low_and_stores_float32():
    model = make(dtype="bfloat16")
    params, buffers = jax.jit(model.init)(0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden, _ = model.hidden(params, buffers, tokens(), context())
    assert hidden.dtype == jnp.bfloat16
    low = model.logits(params, hidden)
    assert low.dtype == jnp.float32
    assert np.abs(low - logits(make(dtype="float32"))).mean() < 0.1


def test_auto_dtype_is_float32_on_cpu_and_bfloat16_elsewhere():
    config = lm.Config()
    assert lm.compute_dtype(config, "cpu") == "float32"
    assert lm.compute_dtype(config, "gpu") == lm.compute_dtype(config, "tpu")
    assert lm.compute_dtype(config, "tpu") == "bfloat16"


def test_shared_parameters_of_two_schedules_start_equal():
    one = make(layers="attention")
    two = make(layers="linear_attention attention")
    first, second = jax.jit(one.init)(5)[0], jax.jit(two.init)(5)[0]
    assert np.array_equal(
        first["token_embedding"]["table"], second["token_embedding"]["table"]
    )
    scanned = first["layers"]["group_0"]["sub_0"]["mixer"]["query"]["kernel"][1]
    single = second["layers"]["group_1"]["sub_0"]["mixer"]["query"]["kernel"][0]
    np.testing.assert_allclose(scanned, single, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_heads": 5}, r"num_heads: must divide embed_dim .* got num_heads=5"),
        ({"num_kv_heads": 3}, r"num_kv_heads: must divide num_heads; got"),
        ({"activation": "swigul"}, r"unknown activation 'swigul'. Did you mean swiglu"),
        ({"head_dim": 7}, r"head_dim: must be even for rotary positions; got 7"),
        ({"dropout": 1.0}, r"dropout.*1.0"),
        ({"layers": "attenton"}, r"unknown mixer 'attenton'. Did you mean attention"),
        ({"mixers": {"local": {}}}, r"local is in no layer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        make(**changes)
