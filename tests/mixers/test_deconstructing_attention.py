"""Facts of deconstructed attention (arXiv 2510.11602)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.conformance import samples
from attnjax.conformance.subject import jitted, subject
from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.decoding import run as decoding_run
from attnjax.mixers import attention
from attnjax.mixers import deconstructing_attention as deconstructed
from attnjax.mixers.slots import running_sums
from attnjax.models import hybrids, lm
from attnjax.models.layout import Layout, by_layer

C, H, D, T = 20, 6, 4, 13
MAP = Hook("map", "weights")
VISIBLE = np.tril(np.ones((T, T), bool))


def layer(variant, **options):
    if variant == "fixed_seq_qk":
        options = {"sequence": (3, 1, 2)} | options
    return subject(deconstructed, {"variant": variant, "chunk_size": 64} | options)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def forward(s, x, ctx, *hooks, params=None):
    arrays = s.arrays if params is None else (params, {})
    y, out = s.forward(arrays, x, ctx.replace(hooks=hooks))
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


# ---- mlp


def test_an_mlp_reads_no_other_position():
    s = layer("mlp")
    x, ctx = samples.sample(s)
    moved = samples.perturb(x, ctx, samples.tokens(T, 5))
    change = np.abs(s.y(*moved) - s.y(x, ctx)).max(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(change), [5])
    # So the context length is nothing to it.
    short, ctx = samples.cut(x, ctx, slice(0, 5))
    np.testing.assert_allclose(
        s.y(short, ctx), s.y(x, samples.sample(s)[1])[:, :5], atol=1e-6
    )


# ---- non_approximate


def test_rows_are_a_softmax_of_scores_of_single_tokens():
    s = layer("non_approximate")
    x, ctx = samples.sample(s)
    y, found = forward(s, x, ctx, MAP, Hook("v", "value"), Hook("o", "heads"))
    weights = found["map"]
    close(weights.sum(-1), np.ones((2, H, T)))
    assert not np.triu(weights, 1).any()
    # The first token mixes nothing but itself.
    close(found["o"][:, 0], np.repeat(found["v"][:, 0], 2, axis=1))
    # One ratio of two keys, whoever asks.
    ratio = weights[:, :, 7:, 3] / weights[:, :, 7:, 7]
    close(ratio, np.repeat(ratio[..., :1], T - 7, axis=-1), atol=1e-4)
    # By the map and by running sums alike.
    close(y, s.y(x, ctx))


def test_prefix_sums_are_a_step_by_step_recurrence():
    s = layer("non_approximate")
    x, ctx = samples.sample(s)
    found = forward(
        s, x, ctx, *(Hook(n, n) for n in ("query", "key", "value", "heads"))
    )
    query, key, value, heads = (
        found[1][n].astype(np.float64) for n in ("query", "key", "value", "heads")
    )
    key, value = (a.repeat(2, axis=2) for a in (key, value))
    silu = query / (1 + np.exp(-query))
    weight = np.exp((silu * key).sum(-1) / math.sqrt(D))[..., None]
    numerator, denominator = 0, 0
    for t in range(T):
        numerator = numerator + weight[:, t] * value[:, t]
        denominator = denominator + weight[:, t]
        close(heads[:, t], numerator / denominator)


def test_rotary_positions_do_nothing_without_pair_scores():
    s = layer("non_approximate")
    x, ctx = samples.sample(s)
    other = ctx.replace(positions=ctx.positions * 7 + 3)
    np.testing.assert_array_equal(s.y(x, other), s.y(x, ctx))
    with pytest.raises(ValueError, match="positions goes with variant=approximate or"):
        deconstructed.Config(positions="none")


def test_huge_scores_neither_overflow_nor_vanish():
    """Scores beyond 1000, falling and rising: a running maximum keeps them in range."""
    rng = np.random.default_rng(0)
    s = jnp.asarray(rng.normal(size=(2, T, 3)) * 1500, jnp.float32)
    value = jnp.asarray(rng.normal(size=(2, T, 3, 5)), jnp.float32)
    ids = np.ones((2, T), np.int32)
    ids[1, 6:] = 2
    start = running_sums.empty(2, 3, [1], 5, has_peak=True, dtype=jnp.float32)

    @jitted
    def run(s, ids):
        *part, decay, peak = running_sums.exponential(s, ids, start)
        spec = deconstructed.kernels.LinearSpec(
            decay="token", normalise=True, chunk_size=4, return_state=True
        )
        operands = {"log_decay": decay, "segment_ids": ids}
        return running_sums.run(
            [part], value, spec, operands, start, peak=peak, goes_on=False, target=None
        )[0]

    visible = VISIBLE & (ids[:, :, None] == ids[:, None, :])
    weights = jax.nn.softmax(
        jnp.where(visible[:, None], jnp.moveaxis(s, 2, 1)[:, :, None], -jnp.inf)
    )
    close(run(s, ids), jnp.einsum("bhts,bshe->bthe", weights, value), atol=1e-4)


# ---- approximate


@pytest.mark.parametrize("second_order", ["diagonal", "full"])
def test_weights_are_the_polynomial_over_its_sum(second_order):
    s = layer("approximate", second_order=second_order, positions="none")
    x, ctx = samples.sample(s)
    y, found = forward(s, x, ctx, MAP, Hook("q", "query"), Hook("k", "key"))
    query, key = found["q"].astype(np.float64), found["k"].astype(np.float64)
    key = key.repeat(2, axis=2)
    terms = np.einsum("bthd,bshd->bhtsd", query, key) / math.sqrt(D)
    dot = terms.sum(-1)
    second = dot**2 if second_order == "full" else (terms**2).sum(-1)
    poly = 1 + dot + second / 2
    if second_order == "full":
        assert poly.min() >= 0.5
    weights = np.where(VISIBLE, poly, 0)
    weights = weights / weights.sum(-1, keepdims=True)
    close(found["map"], weights, atol=1e-4)
    # The map and the running sums alike.
    close(y, s.y(x, ctx), atol=1e-4)


def test_separate_norms_are_three_quotients():
    s = layer("approximate", separate_norm=True, positions="none")
    x, ctx = samples.sample(s)
    found = forward(s, x, ctx, MAP, Hook("q", "query"), Hook("k", "key"))[1]
    query, key = found["q"].astype(np.float64), found["k"].repeat(2, axis=2)
    parts = [
        np.ones((2, H, T, T)),
        np.einsum("bthd,bshd->bhts", query, key),
        np.einsum("bthd,bshd->bhts", query**2, key.astype(np.float64) ** 2),
    ]
    parts = [np.where(VISIBLE, part, 0) for part in parts]
    weights = sum(part / part.sum(-1, keepdims=True) for part in parts)
    scale = np.abs(weights).max(axis=-1, keepdims=True)
    close(found["map"] / scale, weights / scale, atol=2e-4)


@pytest.mark.parametrize(
    ("variant", "elements"),
    [
        ("standard", lambda length: 2 * length * 64),
        ("mlp", lambda length: 0),
        # C, the count of a head among it, and the value sums: 3 C + 2 C D + H.
        ("approximate", lambda length: 3 * 64 + 2 * 64 * 16 + 4),
        ("non_approximate", lambda length: 64 + 2 * 4),
        # The values, and keys and queries that all rows share.
        ("rnd_emb_qk", lambda length: length * 64 + 2 * length * 64),
        ("static_emb_qk", lambda length: 2 * length * 64),
    ],
)
def test_the_decode_state_has_the_sizes_of_the_table(variant, elements):
    dims = MixerDims(embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16)
    config = deconstructed.Config(variant=variant)
    told = deconstructed.SPEC.state_size(config, dims, 50)
    counters = {"mlp": 0, "approximate": 1, "non_approximate": 1}
    assert told == elements(50) + counters.get(variant, 2 * 50 + 2)


# ---- queries and keys from elsewhere


@pytest.mark.parametrize("variant", ["rnd_emb_qk", "fixed_seq_qk"])
def test_the_map_of_a_stream_is_the_same_for_every_input(variant):
    s = layer(variant)
    x, ctx = samples.sample(s, "packed")
    before, found = forward(s, x, ctx, MAP)
    everywhere = np.ones(x.shape[:2], bool)
    after, moved = forward(s, *samples.perturb(x, ctx, everywhere), MAP)
    np.testing.assert_array_equal(moved["map"], found["map"])
    assert np.abs(after - before).max() > 1e-2
    # The third token of any document has the third position's map.
    first, second = found["map"][0], found["map"][1]
    close(second[:, 4, 2:5], first[:, 2, :3], atol=1e-6)


def test_a_static_map_is_that_of_a_standard_layer_fed_with_the_embeddings():
    s, plain = layer("static_emb_qk"), subject(attention, {})
    x, ctx = samples.sample(s)
    fed = forward(plain, ctx.embeddings, ctx, MAP, params=s.arrays[0])[1]["map"]
    own = forward(s, x, ctx, MAP)[1]["map"]
    close(own, fed, atol=1e-6)
    assert (
        np.abs(own - forward(plain, x, ctx, MAP, params=s.arrays[0])[1]["map"]).max()
        > 0.1
    )


def test_a_standard_layer_is_attention():
    s, plain = layer("standard"), subject(attention, {})
    x, ctx = samples.sample(s, "packed")
    close(forward(s, x, ctx)[0], forward(plain, x, ctx, params=s.arrays[0])[0])


TOKENS = (3, 1, 4, 1, 5, 9, 2)


def model(variant, layers="simple*3", **options):
    """A model of 12 channels, its arrays, and its hidden states."""
    mixers = {"simple": {"type": "deconstructing_attention", "variant": variant}}
    mixers["simple"] |= options
    config = lm.Config(
        layers=layers,
        num_layers=None,
        embed_dim=12,
        num_heads=2,
        mlp_dim=16,
        max_len=8,
        init_std=0.4,
        remat="none",
        mixers=mixers,
    )
    return lm.LM(config, vocab_size=11)


def start(made):
    """Parameters away from their starts, and buffers; nothing is compiled."""
    rng = np.random.default_rng(0)

    def draw(a):
        if np.issubdtype(a.dtype, np.integer):
            return np.resize(np.asarray(TOKENS, a.dtype), a.shape)
        return rng.normal(size=a.shape, scale=0.4).astype(a.dtype)

    return jax.tree.map(draw, jax.eval_shape(made.init, 0))


def hidden(made, params, buffers, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ctx = Context(positions=jnp.broadcast_to(positions, tokens.shape))
    return jitted(made.hidden)(params, buffers, tokens, ctx)[0]


def test_a_fixed_sequence_that_is_the_input_gives_standard_attention():
    fixed, standard = model("fixed_seq_qk", sequence=TOKENS), model("standard")
    params, buffers = start(fixed)
    ours, theirs = jax.eval_shape(standard.init, 0)
    assert jax.tree.structure(params) == jax.tree.structure(ours)
    tokens = jnp.asarray([TOKENS])
    expected = hidden(standard, params, theirs | {"layers": buffers["layers"]}, tokens)
    close(hidden(fixed, params, buffers, tokens), expected, atol=1e-4)
    other = hidden(fixed, params, buffers, tokens[:, ::-1])
    theirs = hidden(standard, params, theirs, tokens[:, ::-1])
    assert np.abs(np.asarray(other - theirs)).max() > 0.1


def test_a_stream_passes_the_standard_layers_of_a_hybrid_too():
    """With the text itself for a stream, a hybrid is a standard model."""
    layers = "simple standard simple"
    mixers = {"standard": {"type": "attention"}}
    config = dataclasses.replace(
        model("fixed_seq_qk", sequence=TOKENS).config, layers=layers
    )
    config = dataclasses.replace(config, mixers=dict(config.mixers) | mixers)
    hybrid, standard = (
        lm.LM(config, vocab_size=11),
        model("standard", layers="simple*3"),
    )
    params, buffers = start(hybrid)
    layers = by_layer(params["layers"], hybrid.layout)
    stacked = {
        "group_0": {"sub_0": jax.tree.map(lambda *a: jnp.stack(a), *layers.values())}
    }
    tokens = jnp.asarray([TOKENS])
    empty = {"layers": {"group_0": {"sub_0": {}}}, "streams": {}}
    expected = hidden(standard, params | {"layers": stacked}, empty, tokens)
    close(hidden(hybrid, params, buffers, tokens), expected, atol=1e-4)


def test_a_hybrid_with_a_stream_decodes_like_its_full_pass():
    made = model("rnd_emb_qk", layers="(simple attention)*2", sigma=1.0)
    params, buffers = start(made)
    (name,) = buffers["streams"]
    assert buffers["streams"][name].shape == (1, 8, 12)
    tokens = jnp.asarray([TOKENS, TOKENS[::-1]])
    full = hidden(made, params, buffers, tokens)
    arrays = made.unstack(params, buffers)
    states = jitted(made.init_state, static_argnums=(1, 2))(arrays, 2, 8)
    step, pieces = jitted(made.step), []
    for first, last in [(0, 3), (3, 6), (6, 7)]:
        places = jnp.arange(first, last, dtype=jnp.int32)[None].repeat(2, axis=0)
        ctx = Context(positions=places)
        y, states = step(arrays, states, tokens[:, first:last], ctx)
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), full, atol=1e-4)


def test_layers_that_are_skipped_take_their_stream_along():
    """The skip evaluation: a trained hybrid without its simple layers."""
    made = model("rnd_emb_qk", layers="(simple attention)*2")
    params, buffers = start(made)
    keep = hybrids.skipped(made.names, simple="simple")
    assert keep == (1, 3)
    config = dataclasses.replace(made.config, layers=("attention",) * 2, mixers={})
    short = lm.LM(config, vocab_size=11)
    arrays = decoding_run._relaid(params, buffers, Layout.of(made.names), short, keep)
    assert arrays[1]["streams"] == {}
    own = by_layer(arrays[0]["layers"], short.layout)
    theirs = by_layer(params["layers"], made.layout)
    for place, layer_ in enumerate(keep):
        same = jax.tree.map(np.array_equal, own[place], theirs[layer_])
        assert jax.tree.all(same)
    wanted = jax.eval_shape(short.init, 0)
    assert jax.tree.structure(wanted) == jax.tree.structure(arrays)


def test_equal_starts_are_one_stream_and_different_ones_are_two():
    dims = MixerDims(embed_dim=4, num_heads=2, num_kv_heads=2, head_dim=2, max_len=5)
    make = lambda **o: deconstructed.streams(  # noqa: E731
        deconstructed.Config(**o), dims, jax.random.key(0)
    )
    plain, wide = make(variant="rnd_emb_qk"), make(variant="rnd_emb_qk", sigma=3.0)
    assert set(plain) == {"rnd_emb_qk"} and not set(plain) & set(wide)
    (a,), (b,) = plain.values(), wide.values()
    close(b * dims.init_std / 3.0, a)
    (ids,) = make(variant="fixed_seq_qk", sequence=(7, 2, 5)).values()
    np.testing.assert_array_equal(ids, [[7, 2, 5, 7, 2]])
    assert make(variant="mlp") == {}


# ---- counts and refusals


def test_all_variants_have_equal_parameters():
    dims = MixerDims(embed_dim=896, num_heads=14, num_kv_heads=14, head_dim=64)
    for variant in deconstructed.KINDS:
        sequence = (1,) if variant == "fixed_seq_qk" else ()
        config = deconstructed.Config(variant=variant, sequence=sequence)
        count = deconstructed.SPEC.parameter_count(config, dims)
        if variant == "mlp":
            assert deconstructed.mlp_width(config, dims) == round(4 * 896 / 3)
            assert abs(count - 4 * 896**2) < 3 * 896
        else:
            assert count == 4 * 896**2


def test_a_missing_stream_or_embedding_is_refused():
    s = layer("rnd_emb_qk")
    x, ctx = samples.sample(s)
    with pytest.raises(UserError, match="needs the extra stream 'rnd_emb_qk'; got"):
        s.call(s.arrays, x, ctx.replace(streams={}))
    s = layer("static_emb_qk")
    with pytest.raises(UserError, match="needs the token embeddings; got embeddings=N"):
        s.call(s.arrays, x, ctx.replace(embeddings=None))


def test_hooks_on_streamed_queries_are_refused_while_decoding():
    s = layer("rnd_emb_qk")
    x, ctx = samples.sample(s)
    hook = Hook("half", "query", action="scale")
    ctx = ctx.replace(hooks=(hook,), interventions={"half": np.float32(0.5)})
    with pytest.raises(UserError, match="made before decoding; got hooks"):
        s.call_step(s.arrays, x, s.init_state(2, T), ctx)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sigma": 0.0, "variant": "rnd_emb_qk"}, "sigma must be positive; got 0.0"),
        ({"sigma": 1.0}, "sigma goes with variant=rnd_emb_qk; got variant=non_appr"),
        ({"variant": "mlp", "qk_norm": True}, "qk_norm goes with variant=any other"),
        ({"variant": "mlp", "mlp_dim": 0}, "mlp_dim must be at least 1; got 0"),
        ({"chunk_size": 3}, "chunk_size must be a power of 2; got 3"),
        (
            {"variant": "fixed_seq_qk"},
            "variant=fixed_seq_qk needs a sequence; got none",
        ),
        ({"variant": "fixed_seq_qk", "sequence": (-1,)}, "ids from 0 on; got -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        deconstructed.Config(**options)
