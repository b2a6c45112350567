"""Facts of softmax attention (arXiv 1706.03762) and of its six slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import (
    BROKEN,
    DIMS,
    LAYERS,
    ROPE,
    SEGMENTS,
    B,
    C,
    D,
    H,
    K,
    T,
    all_layers,
    call,
    close,
    context,
    inputs,
    make,
    memory_of,
    run,
)
from flax import nnx

from attnjax import kernels, nn
from attnjax.conformance.subject import jitted
from attnjax.core import schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.mixers import attention

# ---- the definition


def loops(query, key, value, visible):
    """Eq. 1 in numpy float64, one query and one head at a time."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    out = np.zeros((*query.shape[:3], value.shape[3]))
    for b, t, h in np.ndindex(query.shape[:3]):
        kv = h // (query.shape[2] // key.shape[2])
        seen = np.flatnonzero(visible[b, t])
        if len(seen):
            scores = key[b, seen, kv] @ query[b, t, h] / np.sqrt(query.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ value[b, seen, kv] / weights.sum()
    return out


def see(segments=None, causal=True):
    """bool [B, T, T]."""
    visible = np.tril(np.ones((T, T), bool)) if causal else np.ones((T, T), bool)
    visible = np.tile(visible, (B, 1, 1))
    if segments is not None:
        same = segments[:, :, None] == segments[:, None, :]
        visible &= same & (segments[:, :, None] != 0)
    return visible


def test_reference_equals_loops_over_queries():
    rng = np.random.default_rng(3)
    shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, 5)]
    args = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    visible = see(SEGMENTS)
    out = jitted(attention.reference)(*args, visible[:, None])
    close(out, loops(*args, visible))


@pytest.mark.parametrize(
    ("kv_heads", "segments", "causal"),
    [
        (1, None, True),
        (3, None, True),
        (6, None, True),
        (3, None, False),
        (3, SEGMENTS, True),
        (3, SEGMENTS, False),
    ],
    ids=["MQA", "GQA", "MHA", "bidirectional", "packed", "packed bidirectional"],
)
def test_mixer_is_attention_between_four_maps(kv_heads, segments, causal):
    mixer = make({"num_kv_heads": kv_heads, "value_head_dim": 5})
    x = inputs()
    split = lambda a, dim: a.reshape(B, T, -1, dim)  # noqa: E731
    heads = jitted(attention.reference)(
        split(x @ mixer.query.kernel[...], D),
        split(x @ mixer.key.kernel[...], D),
        split(x @ mixer.value.kernel[...], 5),
        see(segments, causal)[:, None],
    )
    expected = heads.reshape(B, T, -1) @ mixer.out.kernel[...]
    close(run(mixer, x, context(segments, causal=causal)), expected)


@pytest.mark.parametrize("name", ["plain", "window and sinks"])
def test_output_ignores_future_tokens(name):
    mixer, x = make(*LAYERS[name]), inputs()
    before = run(mixer, x, context())
    after = run(mixer, x + 3.0 * (np.arange(T) >= 7)[:, None], context())
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).max(axis=(0, 2)).min() > 1e-3


@all_layers
def test_documents_of_a_packed_row_are_as_if_alone(options, dims):
    """The other documents and the padding are cut away: the rest stays the same."""
    mixer, x = make(options, dims), inputs()
    by_place = "positions" in options or (
        "window" in options and "sinks" not in options
    )
    for segments in (SEGMENTS,) if by_place else (SEGMENTS, BROKEN):
        packed = run(mixer, x, context(segments))
        for own in (1, 2, 3, 4, 7):
            front, alone = inputs(seed=5), np.zeros_like(segments)
            for row, ids in enumerate(segments):
                at = np.flatnonzero(ids == own)
                front[row, : len(at)] = x[row, at]
                alone[row, : len(at)] = 1
            y = run(mixer, front, context(alone))
            for row, ids in enumerate(segments):
                at = np.flatnonzero(ids == own)
                close(packed[row, at], y[row, : len(at)])


@pytest.mark.parametrize("name", ["plain", "alibi", "window"])
def test_kernels_know_the_tiles_of_a_packed_row_at_trace_time(name, monkeypatch):
    """No positions reach the kernel, so it skips what masks leave empty."""
    options, dims = LAYERS[name]
    seen = []

    def attention_(q, k, v, spec, operands, **kwargs):
        seen.append((spec.mask, sorted(operands)))
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)

    monkeypatch.setattr(kernels, "attention", attention_)
    make(options, dims)(inputs(), context(SEGMENTS))
    mask, names = seen[0]
    assert not {"q_positions", "k_positions", "q_offset"} & set(names)
    far = kernels.Span(q_first=0, q_last=3, k_first=8, k_last=11)
    assert mask.coverage(far) == kernels.Coverage.EMPTY
    old = kernels.Span(q_first=8, q_last=11, k_first=0, k_last=3)
    is_empty = mask.coverage(old) == kernels.Coverage.EMPTY
    assert is_empty == (name == "window")


@pytest.mark.parametrize("kernel", ["reference", "blocked"])
def test_a_named_kernel_gives_the_same(kernel):
    named = make({}, dataclasses.replace(ROPE, kernel=kernel))
    ctx = context(SEGMENTS)
    close(run(named, inputs(), ctx), run(make({}, ROPE), inputs(), ctx))


# ---- slots


def seen_by_gradient(mixer, ctx):
    """bool [T, T]: which inputs each output depends on."""
    x = inputs(batch=1)
    slope = jitted(jax.jacobian(lambda x: mixer(x, ctx)[0].sum((0, 2))))(x)
    return np.abs(np.asarray(slope)[:, 0]).max(-1) > 0


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_window_counts_tokens_at_and_before_the_query(causal):
    t, s = np.indices((T, T))
    ctx = context(batch=1, causal=causal)
    near = (t - s < 4) & (s - t < 4) & ((s <= t) | (not causal))
    np.testing.assert_array_equal(seen_by_gradient(make({"window": 4}), ctx), near)
    options = {"window": 4, "right_window": 1, "sinks": 2}
    near = ((t - s < 4) | (s < 2)) & (s - t <= (not causal))
    np.testing.assert_array_equal(seen_by_gradient(make(options), ctx), near)


def test_a_further_mask_is_combined_by_and():
    ctx = context(batch=1, mask=kernels.SlidingWindow(left=2, right=0))
    t, s = np.indices((T, T))
    near = (s <= t) & (t - s <= 2)
    np.testing.assert_array_equal(seen_by_gradient(make(), ctx), near)


def test_tokens_of_a_prefix_see_one_another():
    t, s = np.indices((T, T))
    ctx = context(batch=1, prefix_len=np.asarray([5]))
    np.testing.assert_array_equal(seen_by_gradient(make(), ctx), (s <= t) | (s < 5))


def test_a_prefix_counts_tokens_of_the_document_not_padding():
    x, mixer = inputs(), make({}, ROPE)
    pad = lambda a: np.pad(a, ((0, 0), (4, 0), (0, 0)))  # noqa: E731
    plain = run(mixer, x, context(prefix_len=np.asarray([5, 2])))
    segments = np.pad(np.ones((B, T), np.int32), ((0, 0), (4, 0)))
    ctx = context(segments, prefix_len=np.asarray([5, 2]))
    close(run(mixer, pad(x), ctx)[:, 4:], plain)


def test_rotary_scores_depend_on_distances_alone():
    mixer, x = make({}, ROPE), inputs()
    base = run(mixer, x, context())
    moved = run(mixer, x, context().replace(positions=context().positions + 31))
    close(base, moved, atol=1e-4)
    plain = run(make({"positions": "none"}, ROPE), x, context())
    assert np.abs(base - plain).max() > 1e-2


def test_rotary_positions_are_the_models_unless_the_layer_has_its_own():
    x, ctx = inputs(), context()
    inherited = run(make({}, ROPE), x, ctx)
    own = run(make({"rope": nn.Rope(theta=30.0), "qk_norm": True}), x, ctx)
    np.testing.assert_array_equal(inherited, own)
    other = run(make({"rope": nn.Rope(theta=99.0)}, ROPE), x, ctx)
    assert np.abs(inherited - other).max() > 1e-3
    asked = run(make({"positions": "rope"}), x, ctx)
    default = run(make({"rope": nn.Rope()}), x, ctx)
    np.testing.assert_array_equal(asked, default)
    assert make().rope is None


def weights_of(options, dims=DIMS, ctx=None, **changes):
    """Weights and scores [B, H, T, T], by hooks."""
    mixer = make(options, dims)
    for name, value in changes.items():
        getattr(mixer, name)[...] = value
    hooks = (Hook("w", "weights"), Hook("s", "scores"))
    ctx = (ctx or context()).replace(hooks=hooks)
    _, out = call(*nnx.split(mixer), inputs(), ctx)
    return np.asarray(out.records["w"]), np.asarray(out.records["s"])


def test_alibi_subtracts_slope_times_distance():
    _, scores = weights_of({"positions": "alibi"})
    _, plain = weights_of({})
    t, s = np.indices((T, T))
    slopes = nn.alibi_slopes(H)[:, None, None]
    bias = np.where(s <= t, -slopes * (t - s), 0)
    low = np.tril(np.ones((T, T), bool))
    close(np.where(low, scores, 0), np.where(low, plain + bias, 0))


def test_soft_cap_and_scale_act_on_scores():
    _, plain = weights_of({"scale": 1.0})
    _, scaled = weights_of({"scale": 0.25})
    _, capped = weights_of({"scale": 0.25, "soft_cap": 0.7})
    low = np.tril(np.ones((T, T), bool))
    close(scaled[..., low], 0.25 * plain[..., low])
    close(capped[..., low], 0.7 * np.tanh(scaled[..., low] / 0.7))


def test_weight_maps_have_their_closed_forms():
    plain, scores = weights_of({})
    exp = np.exp(scores)
    close(plain, exp / exp.sum(-1, keepdims=True))
    off, _ = weights_of({"weight_map": "off_by_one"})
    close(off, exp / (1 + exp.sum(-1, keepdims=True)))
    sink = np.linspace(-2, 1, H).astype(np.float32)
    logit, _ = weights_of({"weight_map": "sink_logit"}, sink=jnp.asarray(sink))
    total = np.exp(sink)[:, None, None] + exp.sum(-1, keepdims=True)
    close(logit, exp / total)
    gone, _ = weights_of({"weight_map": "sink_logit"}, sink=jnp.full(H, -1e9))
    close(gone, plain)


def test_qk_norm_comes_before_positions_and_bounds_scores():
    _, scores = weights_of({"positions": "rope", "qk_norm": True})
    low = np.tril(np.ones((T, T), bool))
    # Unit root-mean-square vectors: |q.k| / sqrt(D) is at most sqrt(D).
    assert np.abs(scores[..., low]).max() <= np.sqrt(D) * (1 + 1e-5)


# ---- numbers in SPEC


@all_layers
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_spec_counts_parameters_and_state(options, dims, cross):
    if cross and set(options) & {"positions", "window"}:
        return
    config = attention.Config(**options, cross=cross)
    mixer = nnx.eval_shape(lambda: attention.Mixer(config, dims, rngs=nnx.Rngs(0)))
    params = jax.tree.leaves(nnx.state(mixer, nnx.Param))
    assert attention.SPEC.parameter_count(config, dims) == sum(p.size for p in params)
    memory = jnp.zeros((1, 11, C)) if cross else None
    state = jax.eval_shape(
        lambda: make(config_of(config), dims).init_state(1, 11, memory)
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert attention.SPEC.state_size(config, dims, 11) == size


def config_of(config):
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def matmul_flops(jaxpr):
    """FLOPs of every dot_general in a jaxpr, called functions included."""
    total = 0.0
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += matmul_flops(inner)
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contract])
            total += 2.0 * inner * equation.outvars[0].aval.size
    return total


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "value_head_dim": 7}])
def test_spec_flops_are_those_of_the_matrix_products(options):
    mixer = make(options)
    ctx = context(batch=1, causal=False)
    jaxpr = jax.make_jaxpr(lambda x: mixer(x, ctx)[0])(inputs(batch=1))
    expected = attention.SPEC.flops(attention.Config(**options), DIMS, T)
    assert matmul_flops(jaxpr.jaxpr) == expected


def test_a_window_bounds_the_flops():
    flops = lambda n, **o: attention.SPEC.flops(attention.Config(**o), DIMS, n)  # noqa: E731
    assert flops(64, window=8, sinks=1) * 2 == flops(128, window=8, sinks=1)
    assert flops(8, window=8) == flops(8)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1; got 0"),
        ({"window": 0}, "window must be at least 1; got 0"),
        (
            {"sinks": 2},
            "sinks and right_window need a window; got window=none, sinks=2",
        ),
        ({"soft_cap": 0.0}, "soft_cap must be positive; got 0.0"),
        (
            {"rope": {}, "positions": "alibi"},
            "rope goes with positions=rope or inherit",
        ),
        (
            {"cross": True, "positions": "rope"},
            "cross-attention has no common positions",
        ),
        ({"cross": True, "window": 3}, "cross-attention has no window over the memory"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, text):
    path = "config.model.mixers.a"
    filled = schema.resolve(attention.Config, options, path=path)
    with pytest.raises(UserError, match=f"{path}: {text}"):
        schema.build(attention.Config, filled, path=path)


def test_heads_that_do_not_divide_are_refused():
    text = "num_heads=6, num_kv_heads=4. Use one of 1, 2, 3, 6 kv heads"
    with pytest.raises(UserError, match=text):
        make({"num_kv_heads": 4})
    assert make({"num_heads": 5}, dataclasses.replace(DIMS, num_kv_heads=H)).shape == (
        attention.Heads(5, 5, D, D)
    )
    with pytest.raises(UserError, match="head_dim must be even for rotary positions"):
        make({"head_dim": 5}, ROPE)


def test_kernels_that_cannot_serve_are_refused():
    with pytest.raises(
        UserError, match="unknown implementation 'blokced'. Did you mean"
    ):
        make({}, dataclasses.replace(DIMS, kernel="blokced"))
    mixer = make({}, dataclasses.replace(DIMS, kernel="cudnn"))
    with pytest.raises(
        UserError, match="config.model.kernel=cudnn: .*needs platform gpu"
    ):
        mixer(inputs(), context())


def test_cross_attention_without_a_memory_is_refused():
    mixer = make({"cross": True})
    with pytest.raises(UserError, match="cross=true needs a memory; got memory=None"):
        mixer(inputs(), context())
    with pytest.raises(UserError, match="cross=true needs a memory; got memory=None"):
        mixer.init_state(1, 4)


def test_a_step_longer_than_the_cache_is_refused():
    mixer = make()
    with pytest.raises(UserError, match="a step holds at most max_len tokens; got 13"):
        mixer.step(inputs(), mixer.init_state(B, 4), context())


def test_cross_attention_takes_no_further_mask():
    ctx = context(memory=memory_of(), mask=kernels.Causal())
    with pytest.raises(UserError, match="takes no further mask"):
        make({"cross": True})(inputs(), ctx)
