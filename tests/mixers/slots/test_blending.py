"""Weights of heads moved towards others, fused and written out."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.conformance import samples
from attnjax.conformance.subject import jitted, subject
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention, gaam, linear_attention
from attnjax.mixers.slots import curves

B, T, H, K = 2, 13, 6, 3
SHARES = np.asarray([0.0, 1.0, 0.25, 0.5, 0.0, 0.8], np.float32)
OPEN = (Hook("v", "value"), Hook("w", "weights"), Hook("h", "heads"))


def blend(target, **options):
    return Hook("move", "weights", action=f"blend_{target}", **options)


def go(s, x, ctx, *hooks, share=SHARES):
    ctx = ctx.replace(hooks=hooks, interventions={"move": share})
    y, out = s.forward(s.arrays, x, ctx)
    return np.asarray(y), {k: np.asarray(v) for k, v in out.records.items()}


def oracle(weights, seen, value, shares, target):
    """Heads [B, T, H, E] by (1 - u) A + u P in float64."""
    a, v = (np.asarray(z, np.float64) for z in (weights, value))
    p = (
        np.eye(a.shape[-1])
        if target == "identity"
        else seen / np.maximum(seen.sum(-1, keepdims=True), 1)
    )
    u = np.asarray(shares, np.float64)[:, None, None]
    moved = (1 - u) * a + u * p
    v = np.repeat(v, a.shape[1] // v.shape[2], axis=2)
    return moved, np.einsum("bhts,bshe->bthe", moved, v)


LAYERS = {
    "bidirectional": ({}, None, False),
    "causal, packed": ({}, "packed", True),
    "window, cap, sink": (
        {"window": 4, "weight_map": "sink_logit", "soft_cap": 1.0, "num_kv_heads": 1},
        "packed",
        True,
    ),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bidirectional", "identity"),
        ("bidirectional", "uniform"),
        ("causal, packed", "identity"),
        ("window, cap, sink", "uniform"),
    ],
)
def test_fused_and_written_out_blends_are_the_formula(name, target):
    options, layout, causal = LAYERS[name]
    s = subject(attention, options)
    x, ctx = samples.sample(s, layout)
    ctx = ctx.replace(causal=causal)
    opened = go(s, x, ctx, *OPEN, Hook("s", "scores"))[1]
    seen = np.isfinite(opened["s"])
    moved, heads = oracle(opened["w"], seen, opened["v"], SHARES, target)
    y, fused = go(s, x, ctx, blend(target), OPEN[2])
    assert "w" not in fused
    np.testing.assert_allclose(fused["h"], heads, atol=3e-6, rtol=1e-5)
    y_open, explicit = go(s, x, ctx, blend(target), *OPEN)
    np.testing.assert_allclose(explicit["w"], moved, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(explicit["h"], heads, atol=3e-6, rtol=1e-5)
    np.testing.assert_allclose(y, y_open, atol=1e-5)
    if name == "bidirectional":
        assert moved.min() >= 0
        np.testing.assert_allclose(explicit["w"].sum(-1), 1, atol=1e-5)


def mapped(query, key, mask, sink, scale=0.5):
    """softmax(scale q k) [B, H, T, T] in float64, `sink` beside each row's sum."""
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = scale * np.einsum("bthd,bshd->bhts", query, key)
    parts = np.where(mask, np.exp(scores), 0)
    total = parts.sum(-1, keepdims=True) + sink
    return parts / np.where(total > 0, total, 1)


def means(query, mask):
    mean = mask / np.maximum(mask.sum(-1, keepdims=True), 1)
    return np.einsum("bhts,bshd->bthd", mean, query)


@pytest.mark.parametrize(
    ("target", "options", "layout"),
    [
        ("mean_query", {}, None),
        ("mean_query", {"window": 4, "weight_map": "off_by_one"}, "packed"),
        ("temperature", {}, "packed"),
        ("temperature", {"weight_map": "sink_logit"}, None),
    ],
    ids=["mean query", "mean query, window, sink", "temperature", "and a sink"],
)
def test_mean_queries_and_temperatures_are_fused_and_written_out(
    target, options, layout
):
    s = subject(attention, {"positions": "none", **options})
    x, ctx = samples.sample(s, layout)
    ctx = ctx.replace(causal=layout is not None)
    numbers = SHARES if target == "mean_query" else SHARES + 0.3
    laid = (*OPEN, Hook("s", "scores"), Hook("q", "query"), Hook("k", "key"))
    y_open, open_ = go(s, x, ctx, blend(target), *laid, share=numbers)
    query, key = (open_[name].astype(np.float64) for name in "qk")
    mask, sink = np.isfinite(open_["s"]), float("weight_map" in options)
    if target == "mean_query":
        u = SHARES[:, None, None].astype(np.float64)
        weights = (1 - u) * mapped(query, key, mask, sink)
        weights += u * mapped(means(query, mask), key, mask, sink)
    else:
        query = query / numbers[:, None].astype(np.float64)
        if sink:  # Its logit is divided too.
            sink = np.exp(np.asarray(s.arrays[0]["sink"]) / numbers)[:, None, None]
        weights = mapped(query, key, mask, sink)
    np.testing.assert_allclose(open_["w"], weights, atol=2e-6)
    value = np.repeat(open_["v"], H // K, axis=2).astype(np.float64)
    heads = np.einsum("bhts,bshe->bthe", weights, value)
    y, fused = go(s, x, ctx, blend(target), OPEN[2], share=numbers)
    assert "w" not in fused
    np.testing.assert_allclose(fused["h"], heads, atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(open_["h"], heads, atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(y, y_open, atol=1e-5)


def test_a_mean_of_a_memory_is_of_what_is_no_padding():
    s = subject(attention, {"cross": True})
    x, ctx = samples.sample(s, None)
    ctx = samples.with_memory(s, ctx)
    assert (ctx.memory_segment_ids == 0).any()
    moved = [go(s, x, ctx, blend("uniform"), *more)[0] for more in ((), OPEN)]
    np.testing.assert_allclose(*moved, atol=1e-5)


def test_equal_queries_are_their_own_mean():
    s = subject(attention, {"positions": "none"})
    x, ctx = samples.sample(s, None)
    same = np.random.default_rng(0).normal(size=(H, 4)).astype(np.float32)
    hooks = (Hook("q", "query", action="replace"), blend("mean_query"))

    def run(share):
        operands = {"q": same, "move": np.float32(share)}
        here = ctx.replace(hooks=hooks, interventions=operands, causal=False)
        return np.asarray(s.forward(s.arrays, x, here)[0])

    np.testing.assert_allclose(run(1), run(0), atol=1e-5)


def test_each_head_has_its_own_move_and_the_others_keep_their_weights():
    s = subject(attention, {})
    x, ctx = samples.sample(s, None)
    before = go(s, x, ctx.replace(causal=False), *OPEN)[1]
    names = ("largest", "slerp", "nlerp", "log_linear", "temperature")
    hooks = tuple(
        Hook(name, "weights", heads=(head,), action=f"blend_{name}")
        for head, name in enumerate(names)
    )
    # Behind a blend a temperature is that of the blended weights.
    hooks += (Hook("same", "weights", heads=(4,), action="blend_identity"),)
    operands = {name: np.float32(0.4) for name in names} | {"same": np.float32(0.0)}
    here = ctx.replace(hooks=(*hooks, *OPEN), interventions=operands, causal=False)
    after = {
        k: np.asarray(a) for k, a in s.forward(s.arrays, x, here)[1].records.items()
    }
    how = {"seen": np.ones((T, T), bool), "rest": np.zeros((B, 1, T, 1))}
    wanted = before["w"].copy()
    wanted[:, 0] = 0.6 * wanted[:, 0] + 0.4 * curves.largest(wanted[:, 0])
    for head, name in enumerate(("slerp", "nlerp", "log_linear", "tempered"), 1):
        own = before["w"][:, head : head + 1]
        wanted[:, head] = getattr(curves, name)(own, np.float32(0.4), **how)[:, 0]
    np.testing.assert_allclose(after["w"], wanted, atol=2e-6)
    assert np.abs(after["w"] - before["w"])[:, :5].max(axis=(0, 2, 3)).min() > 0.01
    np.testing.assert_allclose(after["w"].sum(-1), 1, atol=1e-5)


def test_a_share_of_nothing_changes_no_bit_and_the_rest_is_affine_in_it():
    s = subject(attention, {})
    x, ctx = samples.sample(s)
    seen = Hook("h", "heads")
    plain = go(s, x, ctx, seen)[1]["h"]
    at = {
        u: go(s, x, ctx, blend("identity"), seen, share=np.float32(u))[1]["h"]
        for u in (0.0, 0.25, 1.0)
    }
    np.testing.assert_array_equal(at[0.0], plain)
    between = 0.75 * at[0.0] + 0.25 * at[1.0]
    np.testing.assert_allclose(at[0.25], between, atol=1e-6, rtol=1e-5)


def test_with_every_head_at_its_own_value_other_tokens_do_not_matter():
    s = subject(attention, {})
    x, ctx = samples.sample(s)
    ctx = ctx.replace(causal=False)
    y, records = go(s, x, ctx, blend("identity"), OPEN[0], share=np.float32(1))
    own = np.repeat(records["v"], H // K, axis=2).reshape(B, T, -1)
    expected = own @ np.asarray(s.arrays[0]["out"]["kernel"])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    turned, _ = go(s, x[:, ::-1], ctx, blend("identity"), share=np.float32(1))
    np.testing.assert_allclose(turned[:, ::-1], y, atol=1e-6)


def test_heads_are_named_by_the_hook_or_by_an_array_that_compiles_once():
    s = subject(attention, {})
    x, ctx = samples.sample(s)
    whole = go(s, x, ctx, blend("identity"))[0]
    some = go(
        s, x, ctx, blend("identity", heads=(5, 1, 2, 3)), share=SHARES[[5, 1, 2, 3]]
    )[0]
    np.testing.assert_allclose(some, whole, atol=1e-6)
    traces = collections.Counter()

    @jitted
    def call(x, ctx):
        traces["call"] += 1
        return s.call(s.arrays, x, ctx)[0]

    s.arrays  # made outside of the trace  # noqa: B018
    table = np.stack([0 * SHARES, SHARES, 1 - SHARES])
    for layer in (0, 1):
        here = ctx.replace(
            hooks=(blend("identity"),),
            interventions={"move": table},
            layer_index=jnp.int32(layer),
        )
        expected = go(s, x, ctx, blend("identity"), share=table[layer])[0]
        np.testing.assert_allclose(call(x, here), expected, atol=1e-6)
    assert traces["call"] == 1


def test_mechanisms_that_lay_their_weights_open_are_moved_too():
    s = subject(linear_attention, {})
    x, ctx = samples.sample(s)
    before = go(s, x, ctx, *OPEN)[1]
    share = SHARES[: before["w"].shape[1]]
    after = go(s, x, ctx, blend("identity"), *OPEN, share=share)[1]
    moved, _ = oracle(before["w"], None, before["v"], share, "identity")
    np.testing.assert_allclose(after["w"], moved, atol=1e-5)
    text = refused(s, blend("uniform"), share=share)
    assert "needs a mechanism that tells which keys" in text
    text = refused(s, blend("slerp"), share=share)
    assert "blend_slerp needs a mechanism that tells which keys" in text


def refused(s, hook, share=SHARES, is_step=False, **changes):
    x, ctx = samples.sample(s)
    ctx = ctx.replace(hooks=(hook,), interventions={"move": share}, **changes)
    with pytest.raises(UserError) as error:
        if is_step:
            s.call_step(s.arrays, x, s.init_state(B, T), ctx)
        else:
            jax.eval_shape(lambda x: s.call(s.arrays, x, ctx)[0], x)
    return str(error.value)


def test_what_cannot_be_blended_is_refused():
    s = subject(attention, {})
    text = refused(s, Hook("move", "heads", action="blend_identity"))
    assert "blend_identity changes 'weights'; got hook 'move' (what='heads')" in text
    text = refused(s, blend("identity"), is_step=True)
    assert "acts on the full pass; got hook 'move' in a decoding step" in text
    text = refused(s, blend("identity"), share=SHARES[:4])
    assert "one for each of the 6 heads, or [layers, 6]; got shape=(4,)" in text
    text = refused(s, blend("identity", heads=(6,)), share=np.float32(1))
    assert "heads of 'weights' are 0 to 5; got heads=(6,)" in text
    text = refused(s, Hook("move", "weights", action="blend_sharp"))
    assert "unknown hook action 'blend_sharp'" in text and "blend_uniform" in text
    summed = {"output": ({"type": "attention_sink_survey", "weight_map": "sigmoid"},)}
    text = refused(subject(attention, summed), blend("nlerp"))
    assert "blend_nlerp needs rows that softmax makes, shares of 1" in text
    cross = subject(attention, {"cross": True})
    x, ctx = samples.sample(cross)
    ctx = samples.with_memory(cross, ctx)
    with pytest.raises(UserError, match="blend_identity needs self-attention"):
        go(cross, x, ctx, blend("identity"))
    with pytest.raises(UserError, match="blend_mean_query needs self-attention"):
        go(cross, x, ctx, blend("mean_query"))
    text = refused(subject(gaam, {}), blend("identity"))
    assert "needs weights of heads over keys, [B, H, T, S]" in text
