"""Hooks of attention: the explicit path, records and interventions."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.conformance import samples
from attnjax.conformance.subject import jitted, subject
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention

B, T, C, H, K, D = 2, 13, 20, 6, 3, 4
LAYERS = {
    "plain": {},
    "window, sinks, sink logit": {
        "window": 4,
        "sinks": 2,
        "weight_map": "sink_logit",
        "num_kv_heads": 1,
        "value_head_dim": 5,
    },
    "alibi, cap, off by one": {
        "positions": "alibi",
        "soft_cap": 1.0,
        "weight_map": "off_by_one",
    },
    "gated": {"output": [{"type": "gated_attention"}]},
}


def layer(name="plain"):
    return subject(attention, LAYERS[name])


def probe(s, x, ctx, *hooks, **operands):
    """y and the records."""
    ctx = ctx.replace(hooks=hooks, interventions=operands)
    y, out = s.forward(s.arrays, x, ctx)
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


def change(what, action, heads=None):
    return Hook("change", what, heads=heads, action=action)


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


# ---- the explicit path


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", ["packed", None])
def test_explicit_path_equals_the_kernel_path(name, layout):
    s = layer(name)
    x, ctx = samples.sample(s, layout)
    y, records = probe(s, x, ctx, Hook("w", "weights"), Hook("s", "scores"))
    close(y, s.y(x, ctx))
    assert records["w"].shape == records["s"].shape == (B, H, T, T)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_explicit_path_are_those_of_the_kernel(name):
    s = layer(name)
    x, ctx = samples.sample(s, "packed")
    weight = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)

    def grad(ctx):
        loss = lambda a, x: jnp.sum(weight * s.call(a, x, ctx)[0])  # noqa: E731
        return jitted(jax.grad(loss, argnums=(0, 1)))(s.arrays, x)

    found = grad(ctx.replace(hooks=(Hook("w", "weights"),)))
    jax.tree.map(lambda a, b: close(a, b, atol=2e-4), found, grad(ctx))


def test_a_row_that_sees_nothing_is_zero_with_zero_gradients():
    s = layer()
    x, ctx = samples.sample(s)
    ctx = ctx.replace(segment_ids=np.zeros((B, T), np.int32))
    ctx = ctx.replace(hooks=(Hook("w", "weights"),))

    def loss(x):
        y, out, _ = s.call(s.arrays, x, ctx)
        return jnp.sum(y**2) + jnp.sum(out.records["w"] ** 2), out.records["w"]

    (slope, weights) = jitted(jax.grad(loss, has_aux=True))(x)
    assert not np.any(np.asarray(slope)) and not np.any(np.asarray(weights))


# ---- records


def test_records_are_what_their_names_say():
    s = subject(attention, {"positions": "none"})
    x, ctx = samples.sample(s, "packed")
    names = ("input", "query", "key", "value", "scores", "weights", "heads", "output")
    y, r = probe(s, x, ctx, *(Hook(name, name) for name in names))
    np.testing.assert_array_equal(r["input"], x)
    np.testing.assert_array_equal(r["output"], y)
    key, value = (np.repeat(r[name], H // K, axis=2) for name in ("key", "value"))
    scores = np.einsum("bthd,bshd->bhts", r["query"], key) / np.sqrt(D)
    t, s_ = np.indices((T, T))
    own, other = ctx.segment_ids[:, :, None], ctx.segment_ids[:, None, :]
    seen = ((s_ <= t) & (own == other) & (own != 0))[:, None]
    np.testing.assert_array_equal(np.isfinite(r["scores"]), np.tile(seen, (1, H, 1, 1)))
    close(np.where(seen, r["scores"], 0), np.where(seen, scores, 0))
    total = r["weights"].sum(-1)
    close(total, np.tile((ctx.segment_ids != 0)[:, None], (1, H, 1)))
    close(r["heads"], np.einsum("bhts,bshe->bthe", r["weights"], value))
    close(y, r["heads"].reshape(B, T, -1) @ s.arrays[0]["out"]["kernel"])


def test_hooks_name_the_heads_they_read():
    s = layer()
    x, ctx = samples.sample(s)
    hooks = [Hook("all", "weights"), Hook("some", "weights", heads=(4, 1))]
    hooks += [Hook("keys", "key", heads=(2,)), Hook("key", "key")]
    _, r = probe(s, x, ctx, *hooks)
    np.testing.assert_array_equal(r["some"], r["all"][:, [4, 1]])
    np.testing.assert_array_equal(r["keys"], r["key"][:, :, [2]])


def test_cross_attention_is_probed_over_the_memory():
    s = subject(attention, {"cross": True})
    x, ctx = samples.sample(s)
    ctx = samples.with_memory(s, ctx)
    y, r = probe(s, x, ctx, Hook("w", "weights"))
    assert r["w"].shape == (B, H, T, samples.MEMORY_LEN)
    assert not np.any(r["w"][0, ..., -1])  # padding of the memory
    close(y, s.y(x, ctx))


# ---- interventions


@pytest.mark.parametrize(
    "what", ["input", "query", "key", "value", "weights", "heads", "output"]
)
def test_interventions_scale_add_and_replace(what):
    s = layer()
    x, ctx = samples.sample(s, "packed")
    seen = Hook("seen", what)
    before = probe(s, x, ctx, seen)[1]["seen"]
    operand = np.random.default_rng(6).normal(size=before.shape[-2:])
    operand = operand.astype(np.float32)
    expected = {
        "scale": before * operand,
        "add": before + operand,
        "replace": np.broadcast_to(operand, before.shape),
    }
    for action, result in expected.items():
        y, r = probe(s, x, ctx, change(what, action), seen, change=operand)
        close(r["seen"], result)
        # What comes after reads the changed value.
        forced, _ = probe(s, x, ctx, change(what, "replace"), change=result)
        close(y, forced, atol=1e-4)
        assert np.abs(y - s.y(x, ctx)).max() > 1e-2


def test_interventions_on_scores_come_before_the_mask():
    s = layer()
    x, ctx = samples.sample(s, "packed")
    hooks = (Hook("s", "scores"), Hook("w", "weights"))
    before = probe(s, x, ctx, *hooks)[1]
    bias = np.random.default_rng(6).normal(size=(H, T, T)).astype(np.float32)
    _, after = probe(s, x, ctx, change("scores", "add"), *hooks, change=bias)
    seen = np.isfinite(before["s"])
    np.testing.assert_array_equal(np.isfinite(after["s"]), seen)
    exp = np.where(seen, np.exp(np.where(seen, before["s"] + bias, 0)), 0)
    total = exp.sum(-1, keepdims=True)
    close(after["w"], exp / np.where(total > 0, total, 1))
    # Scaling by zero makes weights uniform over what is visible.
    zero = np.float32(0)
    _, flat = probe(s, x, ctx, change("scores", "scale"), *hooks, change=zero)
    count = seen.sum(-1, keepdims=True)
    close(flat["w"], seen / np.maximum(count, 1))


def test_interventions_touch_the_named_heads_alone():
    s = layer()
    x, ctx = samples.sample(s)
    seen = Hook("seen", "heads")
    before = probe(s, x, ctx, seen)[1]["seen"]
    cut = change("heads", "scale", heads=(0, 5))
    after = probe(s, x, ctx, cut, seen, change=np.float32(0))[1]["seen"]
    assert not np.any(after[:, :, [0, 5]])
    np.testing.assert_array_equal(after[:, :, 1:5], before[:, :, 1:5])


def test_interventions_apply_in_the_order_of_the_hooks():
    s = layer()
    x, ctx = samples.sample(s)
    add, scale = Hook("a", "output", action="add"), Hook("b", "output", action="scale")
    operands = {"a": np.float32(1), "b": np.float32(2)}
    y = s.y(x, ctx)
    close(probe(s, x, ctx, add, scale, **operands)[0], 2 * (y + 1))
    close(probe(s, x, ctx, scale, add, **operands)[0], 2 * y + 1)


def test_other_numbers_do_not_compile_again():
    s = layer()
    x, ctx = samples.sample(s)
    traces = collections.Counter()

    @jitted
    def call(x, ctx):
        traces["call"] += 1
        return s.call(s.arrays, x, ctx)[0]

    s.arrays  # made outside of the trace  # noqa: B018
    ctx = ctx.replace(hooks=(change("weights", "scale"),))
    outs = [
        np.asarray(call(x, ctx.replace(interventions={"change": np.float32(n)})))
        for n in (1.0, 0.5)
    ]
    assert traces["call"] == 1
    close(outs[1], 0.5 * outs[0])


def test_interventions_act_while_decoding():
    s = layer()
    x, ctx = samples.sample(s)
    ctx = ctx.replace(
        hooks=(change("weights", "scale", heads=(2,)),),
        interventions={"change": np.float32(0)},
    )
    full = np.asarray(s.forward(s.arrays, x, ctx)[0])
    y, _ = s.step(s.arrays, x, s.init_state(B, T), ctx)
    close(y, full)
    assert np.abs(full - s.y(x, ctx.replace(hooks=(), interventions={}))).max() > 1e-2


# ---- refusals


def refused(s, *hooks, is_step=False, **operands):
    x, ctx = samples.sample(s)
    ctx = ctx.replace(hooks=hooks, interventions=operands)
    with pytest.raises(UserError) as error:
        if is_step:
            s.call_step(s.arrays, x, s.init_state(B, T), ctx)
        else:
            s.call(s.arrays, x, ctx)
    return str(error.value)


def test_unknown_places_and_actions_list_the_known_ones():
    text = refused(layer(), Hook("p", "weight"))
    assert text.startswith("attention: unknown hook 'weight'. Did you mean weights")
    text = refused(layer(), Hook("p", "weights", action="erase"), p=np.float32(0))
    assert "unknown hook action 'erase'" in text and "replace, scale" in text
    text = refused(layer(), Hook("p", "gate_g1"))
    assert "unknown hook 'gate_g1'" in text
    assert "gate_g1" in refused(layer("gated"), Hook("p", "gate"))


def test_records_while_decoding_are_refused():
    text = refused(layer(), Hook("p", "weights"), is_step=True)
    assert "records come from the full pass; got hook 'p'" in text


def test_an_intervention_without_its_array_is_refused():
    text = refused(layer(), change("weights", "add"), other=np.float32(0))
    assert "'change' needs its array; got interventions=['other']" in text


@pytest.mark.parametrize("shape", [(B, H, T, T + 1), (3, B, H, T, T)])
def test_an_array_that_does_not_fit_is_refused(shape):
    operand = np.zeros(shape, np.float32)
    text = refused(layer(), change("weights", "add"), change=operand)
    assert f"must broadcast to weights {(B, H, T, T)}; got shape={shape}" in text


def test_heads_that_are_not_there_are_refused():
    text = refused(layer(), Hook("p", "key", heads=(0, 3)))
    assert "heads of 'key' are 0 to 2; got heads=(0, 3)" in text
    text = refused(layer(), Hook("p", "output", heads=(0,)))
    assert "'output' has no heads; got heads=(0,). Use heads=None." in text
