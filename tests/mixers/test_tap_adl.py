"""Facts of token-aware average pooling and attention diversification (2303.11126)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_layers import SEGMENTS, place
from flax import nnx
from grid_layers import close, heads, made, out, tokens, wide

from attnjax import kernels, nn
from attnjax.conformance.subject import jitted
from attnjax.core import schema
from attnjax.core.context import Context, Hook
from attnjax.core.errors import UserError
from attnjax.core.spec import MixerDims
from attnjax.mixers import attention, davit, neighborhood_attention, tap_adl
from attnjax.models import vit
from attnjax.models.block import Block, BlockDims
from attnjax.training import kernel_log

B, GRID, C, K = 2, (3, 5), 6, 4
DIMS = MixerDims(embed_dim=C, num_heads=2, num_kv_heads=2, head_dim=4, init_std=0.4)
ON_GRID = dataclasses.replace(DIMS, grid=GRID)


def images(grid=GRID, channels=C, seed=0, batch=B):
    return np.random.default_rng(seed).normal(size=(batch, *grid, channels))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- oracles in float64, place by place


def neighbours(at, grid, distance):
    """The 3^rank places around one, in row-major order; None outside of the grid."""
    for step in itertools.product((-1, 0, 1), repeat=len(grid)):
        spot = tuple(p + distance * s for p, s in zip(at, step, strict=True))
        inside = all(0 <= p < n for p, n in zip(spot, grid, strict=True))
        yield spot if inside else None


def pool_by_hand(image, distance):
    grid = image.shape[1:-1]
    found = np.zeros_like(image)
    for at in np.ndindex(grid):
        seen = [s for s in neighbours(at, grid, distance) if s is not None]
        total = sum(image[(slice(None), *s)] for s in seen)
        found[(slice(None), *at)] = total / 3 ** len(grid)
    return found if distance else image


def convolution_by_hand(image, kernel):
    grid = image.shape[1:-1]
    kernel = kernel.reshape(image.shape[-1], 3 ** len(grid), -1)
    found = np.zeros((*image.shape[:-1], kernel.shape[-1]))
    for at in np.ndindex(grid):
        for index, spot in enumerate(neighbours(at, grid, 1)):
            if spot is not None:
                here = image[(slice(None), *spot)] @ kernel[:, index]
                found[(slice(None), *at)] += here
    return found


def shares_by_hand(image, params, statistics=None):
    """s, and the mean and the (biased) variance that they were normed by."""
    hidden = convolution_by_hand(image, params["into"]["kernel"])
    flat = hidden.reshape(-1, hidden.shape[-1])
    mean, variance = statistics or (flat.mean(0), flat.var(0))
    normed = (hidden - mean) / np.sqrt(variance + 1e-5)
    normed = normed * params["norm_scale"] + params["norm_bias"]
    logits = convolution_by_hand(normed, params["out"]["kernel"])
    return softmax(logits), (mean, variance)


def pooled_by_hand(image, shares):
    pools = (pool_by_hand(image, i) for i in range(shares.shape[-1]))
    return sum(shares[..., i : i + 1] * one for i, one in enumerate(pools))


def likeness_by_hand(weights, *, threshold=2.0, seen=None):
    """L of weights [B, H, T, N], a row at a time; seen bool [B, T, N]."""
    rows = weights.mean(1)
    seen = np.ones(rows.shape, bool) if seen is None else seen
    cosines = []
    for own, sees in zip(rows, seen, strict=True):
        mean = own.sum(0) / np.maximum(sees.sum(0), 1)
        for row, keys in zip(own, sees, strict=True):
            if not keys.any():
                continue
            least = threshold / keys.sum()
            a = np.where(keys & (row > least), row, 0)
            b = np.where(keys & (mean > least), mean, 0)
            size = max(np.linalg.norm(a) * np.linalg.norm(b), 1e-16)
            cosines.append(a @ b / size)
    return np.mean(cosines)


LIKENESS = jitted(tap_adl.likeness)


def likeness(weights, seen=None, threshold=2.0):
    seen = np.ones((1, 1, *weights.shape[2:]), bool) if seen is None else seen
    return float(LIKENESS(weights.astype(np.float32), seen, threshold=threshold))


def some_weights(length=11, sharp=3.0, seed=0):
    """Rows that look at some keys in common."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=(B, 3, length, length))
    return softmax(sharp * (own + rng.normal(size=(B, 1, 1, length))))


# ---- TAP


def predictor_of(rank=2, scales=K, seed=1):
    """The parameters of a predictor, and (params, image [B, *grid, C]) -> s, x_tap and
    the buffers after training, compiled, in float64."""
    dims = dataclasses.replace(DIMS, dtype="float64", param_dtype="float64")
    made = nnx.eval_shape(
        lambda: tap_adl.Predictor(scales, rank, dims, rngs=nnx.Rngs(0))
    )
    graph, params, buffers = nnx.split(made, nnx.Param, nn.Buffer)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda a: rng.normal(size=a.shape), params)

    @jitted
    def call(params, image):
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)
        predictor = nnx.merge(graph, params, start)
        shares = predictor(image, train=True)
        return shares, tap_adl.pooled(image, shares, scales=scales)

    return drawn, call


def test_one_scale_is_the_identity_whatever_the_predictor():
    with jax.enable_x64(True):
        params, call = predictor_of(scales=1)
        shares, y = call(params, images())
    assert (np.asarray(shares) == 1).all()
    np.testing.assert_array_equal(y, images())


def test_the_predictors_norm_adds_its_epsilon_to_the_variance():
    """A factor makes up for a variance of 0, as for one that lacks an epsilon to 1."""
    eps, ones = 1e-5, np.ones(K)
    p = tap_adl.Predictor(K, 2, MixerDims(6, 2, 2, 3, grid=GRID), rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).normal(size=(1, 2, 2, 6)).astype(np.float32)
    found = []
    for variance, scale in ((0.0, eps**0.5), (1 - eps, 1.0)):
        p.norm_variance[...] = jnp.asarray(variance * ones, jnp.float32)
        p.norm_scale[...] = jnp.asarray(30 * scale * ones, jnp.float32)
        found.append(p(image, train=False))
    close(*found, atol=1e-4)
    assert np.std(found[0]) > 1e-2


def test_a_predictor_of_zeros_gives_the_mean_of_the_pools():
    image = images()
    with jax.enable_x64(True):
        params, call = predictor_of()
        params.out.kernel[...] = np.zeros(params.out.kernel.shape)
        shares, y = call(params, image)
        fixed = jitted(
            lambda x: [
                tap_adl.pooled(x, None, scales=K, pooling=name)
                for name in ("mean", "last")
            ]
        )(image)
    close(shares, np.full((B, *GRID, K), 1 / K))
    expected = sum(pool_by_hand(image, i) for i in range(K)) / K
    close(y, expected)
    close(fixed[0], expected)
    close(fixed[1], pool_by_hand(image, K - 1))


@pytest.mark.parametrize("distance", [1, 2])
def test_a_constant_map_keeps_its_interior_and_shrinks_at_the_border(distance):
    y = np.array(tap_adl.pool(jnp.ones((1, 5, 7, 2)), distance))
    inner = slice(distance, -distance)
    close(y[:, inner, inner], np.ones_like(y[:, inner, inner]))
    close(y[0, 0, 0], [4 / 9] * 2)  # of its nine places a corner has four
    close(y[0, 0, 3], [6 / 9] * 2)
    y[:, inner, inner] = 0
    assert y.max() < 0.7


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_a_pool_conserves_the_mean_of_what_lies_inside(distance):
    image = np.zeros((1, 11, 12, 2), np.float32)
    image[:, 3:-3, 3:-3] = images((5, 6), 2, batch=1)
    y = np.asarray(tap_adl.pool(jnp.asarray(image), distance))
    close(y.mean((1, 2)), image.mean((1, 2)), atol=1e-7)
    assert np.abs(y - image).max() > 0.1


@pytest.mark.parametrize("grid", [(7,), GRID, (2, 3, 4)], ids=str)
def test_pools_and_shares_that_sum_to_one_are_the_definition_on(grid):
    """The pools reach beyond the shorter axes."""
    image = images(grid)
    with jax.enable_x64(True):
        params, call = predictor_of(rank=len(grid))
        shares, y = call(params, image)
        plain = y
        if len(grid) == 2:
            plain = jitted(tap_adl.reference)(image, shares)
        shares, y, plain = (np.asarray(a) for a in (shares, y, plain))
    expected, _ = shares_by_hand(image, nnx.to_pure_dict(params))
    assert shares.std() > 1e-2
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    np.testing.assert_allclose(y, pooled_by_hand(image, expected), atol=1e-12)
    np.testing.assert_allclose(plain, y, atol=1e-12)


# ---- ADL


def test_queries_that_look_alike_have_a_likeness_of_one():
    rows = np.broadcast_to(some_weights()[:, :, :1], (B, 3, 11, 11))
    assert rows.mean(1).max() > 2 / 11
    assert likeness(rows) == pytest.approx(1, abs=1e-6)


def test_uniform_weights_have_a_likeness_of_zero():
    assert likeness(np.full((B, 3, 11, 11), 1 / 11)) == 0


def test_tokens_that_look_at_themselves_have_a_likeness_of_zero():
    """m is 1 / N everywhere, which is below the threshold."""
    assert likeness(np.broadcast_to(np.eye(11), (B, 3, 11, 11))) == 0


def test_the_likeness_does_not_depend_on_the_order_of_queries_or_keys():
    weights, rng = some_weights(), np.random.default_rng(3)
    found = likeness(weights)
    assert 0.05 < found < 0.95
    for other in (
        weights[:, :, rng.permutation(11)],
        weights[..., rng.permutation(11)],
    ):
        assert likeness(other) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("sharp", [0.3, 3.0, 9.0])
def test_the_likeness_is_the_definition_and_lies_between_zero_and_one(threshold, sharp):
    weights = some_weights(sharp=sharp)
    found = likeness(weights, threshold=threshold)
    assert 0 <= found <= 1 + 1e-6
    expected = likeness_by_hand(weights, threshold=threshold)
    assert found == pytest.approx(expected, abs=1e-6)


def test_rows_are_averaged_before_the_threshold_and_heads_before_the_cosine():
    """Two queries at one key and two at another: m is 1 / 2 at both, and would be less
    with the rows of the other one cut off; heads that look apart look alike on
    average."""
    apart = np.zeros((1, 1, 4, 4))
    apart[0, 0, :2, 0] = apart[0, 0, 2:, 1] = 0.6
    apart[0, 0, :2, 1] = apart[0, 0, 2:, 0] = 0.4
    # Cut first, m would be (0.3, 0.3) and all below 2 / N; so it is (0.5, 0.5), and
    # only more than 0.5 counts with N = 4.
    assert likeness(apart, threshold=1.9) == pytest.approx(np.sqrt(0.5), abs=1e-6)
    assert likeness(apart) == 0
    both = np.zeros((1, 2, 4, 4))
    both[:, 0, :, 0] = both[:, 1, :, 1] = 1
    assert likeness(both, threshold=1.9) == pytest.approx(1)


def test_the_threshold_falls_with_the_keys():
    """Four keys of the same weight stand out among more than eight."""
    for length, expected in ((8, 0), (9, 1)):
        weights = np.zeros((1, 1, length, length))
        weights[..., :4] = 1 / 4
        assert likeness(weights) == pytest.approx(expected)


def test_hidden_keys_count_neither_for_the_mean_nor_for_the_threshold():
    """Causal rows of two documents, with padding behind."""
    ids = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0])
    seen = (ids[:, None] == ids) & (ids != 0)[:, None] & np.tri(11, dtype=bool)
    weights = np.where(seen, some_weights(), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-9)
    expected = likeness_by_hand(weights, seen=np.broadcast_to(seen, (B, 11, 11)))
    assert 0.05 < expected < 0.95
    assert likeness(weights, seen[None, None]) == pytest.approx(expected, abs=1e-6)


def test_the_likeness_has_the_gradient_of_its_definition_and_none_where_it_is_zero():
    seen = jnp.ones((1, 1, 5, 5), bool)
    weights = some_weights(5)
    step = 1e-6 * np.random.default_rng(5).normal(size=weights.shape)
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(lambda w: tap_adl.likeness(w, seen, threshold=1.0)))
        found = np.sum(np.asarray(slope(jnp.asarray(weights))) * step)
        far, near = (
            likeness_by_hand(weights + side * step, threshold=1.0) for side in (1, -1)
        )
        assert found == pytest.approx((far - near) / 2, rel=1e-5)
        flat = np.asarray(slope(jnp.full((B, 3, 5, 5), 1 / 5)))
    assert (flat == 0).all()


# ---- both in a layer


@pytest.fixture(scope="module")
def layer():
    options = {"diversity_weight": 0.5, "threshold": 1.2}
    return made(tap_adl, GRID, options, use_bias=True)


def layer_by_hand(params, x, statistics=None):
    """y, L, and the statistics of the norm; two tokens stand before the grid."""
    slot = params["slot_tap_adl"]["predictor"]
    image = x[:, 2:].reshape(len(x), *GRID, -1)
    shares, found = shares_by_hand(image, slot, statistics)
    image = pooled_by_hand(image, shares).reshape(x[:, 2:].shape)
    x = np.concatenate([x[:, :2], image], 1)
    query, key, value = heads(params, x, 6)
    groups = query.shape[2] // key.shape[2]
    key, value = (np.repeat(a, groups, 2) for a in (key, value))
    weights = softmax(np.einsum("bthd,bshd->bhts", query, key) / 6**0.5)
    y = out(params, np.einsum("bhts,bshd->bthd", weights, value))
    return y, likeness_by_hand(weights, threshold=1.2), found


def test_a_layer_is_the_definition_in_training_and_in_evaluation(layer):
    x, ctx = tokens(layer, extra=2)
    params, before = layer.arrays
    call = jitted(layer.call)
    y, report, after = call((params, before), x, ctx.replace(train=True))
    expected, level, (mean, variance) = layer_by_hand(wide(params), x)
    close(y, expected, atol=1e-4)
    assert float(report.metrics["adl"]) == pytest.approx(level, abs=1e-4)
    assert float(report.losses["adl_loss"]) == pytest.approx(level / 2, abs=1e-4)
    assert 0.05 < level < 0.95 and not report.records
    kept = after["slot_tap_adl"]["predictor"]
    count = B * 3 * 5
    close(kept["norm_mean"], 0.1 * mean, atol=1e-4)
    close(kept["norm_variance"], 0.9 + 0.1 * variance * count / (count - 1), 1e-4)
    # Evaluation reads what is kept, and reports and keeps nothing.
    y, report, same = call((params, after), x, ctx)
    kept = wide(kept)
    statistics = (kept["norm_mean"], kept["norm_variance"])
    close(y, layer_by_hand(wide(params), x, statistics)[0], atol=1e-4)
    assert not report.losses and not report.metrics
    jax.tree.map(np.testing.assert_array_equal, same, after)


def test_without_pools_and_loss_a_layer_is_plain_attention():
    """In training, to the operation."""
    traces = []
    off = {"scales": 1, "diversity_weight": 0.0}
    for module, options in ((tap_adl, off), (attention, {})):
        s = made(module, GRID, options, head_dim=6)
        x, ctx = tokens(s)
        arrays = jax.eval_shape(s.init, 0)
        trace = jax.make_jaxpr(s.call)(arrays, x, ctx.replace(train=True))
        traces.append((str(trace), str(arrays)))
    assert traces[0] == traces[1]


@pytest.mark.parametrize(
    ("options", "train", "used"),
    [
        ({"diversity_weight": 0.0}, True, "blocked"),
        ({}, False, "blocked"),
        ({}, True, "explicit"),
        ({"diversity_weight": 0.0, "report": True}, True, "explicit"),
    ],
)
def test_weights_are_computed_for_the_loss_alone(options, train, used):
    s = made(tap_adl, GRID, options)
    x, ctx = tokens(s)
    arrays = jax.eval_shape(s.init, 0)
    with kernels.watching() as watch:
        found = jax.eval_shape(s.call, arrays, x, ctx.replace(train=train))[1]
    (line,) = kernel_log.lines(watch.choices)
    assert line.startswith(f"attention by {used}: q [2, 15, 6, 6]")
    assert ("adl" in found.metrics) == (used == "explicit")
    assert ("adl_loss" in found.losses) == (used == "explicit" and not options)
    if used == "explicit":
        assert line.endswith("; its weights are read, which no kernel returns")
        (record,) = kernel_log.records(watch.choices)
        assert record["others"] == [
            "every kernel: its weights are read, which no kernel returns"
        ]


@pytest.mark.parametrize("kind", [attention, neighborhood_attention])
def test_tokens_are_pooled_before_the_norm_of_the_block(kind):
    """x + Attn(norm(x_tap)), the residual as it was."""
    tap = {"type": "tap_adl", "pooling": "mean", "diversity_weight": 0.0}
    places = jnp.arange(15, dtype=jnp.int32)[None]
    ctx = Context(positions=places, causal=False, grid=GRID)

    window = {} if kind is attention else {"window": 3}

    def block(*output):
        return Block(
            lambda *, rngs: kind.Mixer(
                kind.Config(output=output, **window), ON_GRID, rngs=rngs
            ),
            BlockDims(embed_dim=C, mlp_dim=0, norm="layer"),
            rngs=nnx.Rngs(0),
        )

    @jitted
    def run(x, pools):
        with_tap, plain = block(tap), block()
        return (
            with_tap(x, {}, ctx)[0] - x,
            plain.mixer(plain.norm_mixer(pools), ctx)[0],
            with_tap.mixer(with_tap.norm_mixer(x), ctx)[0],
        )

    image = images() + np.linspace(0, 5, 5)[:, None]
    pools = pooled_by_hand(image, np.full((B, *GRID, K), 1 / K))
    rows = (a.reshape(B, 15, C).astype(np.float32) for a in (image, pools))
    found, expected, behind = (np.asarray(a) for a in run(*rows))
    close(found, expected)
    assert np.abs(behind - expected).max() > 1e-2


def test_a_model_adds_the_mean_of_its_layers_losses():
    """Beside records that a hook asks for; each layer keeps statistics of its own."""
    options = dict(embed_dim=8, num_heads=2, num_layers=2, patch_size=2, mlp_dim=8)
    config = schema.build(
        vit.Config,
        vit.resolve(
            {
                **options,
                "layers": "tap_adl",
                "class_token": True,
                "mixers": {"tap_adl": {"diversity_weight": 2.0}},
            }
        ),
    )
    model = vit.ViT(config, image_size=6, channels=2, num_classes=3)
    rng = np.random.default_rng(4)
    params, buffers = jax.tree.map(
        lambda a: (0.5 * rng.normal(size=a.shape)).astype(np.float32),
        jax.eval_shape(model.init, 0),
    )
    pictures = images((6, 6), 2).astype(np.float32)

    def call(params, buffers, pictures):
        hooks = (Hook("w", "weights"),)  # beside the layer's own
        ctx = model.context(batch=B, train=True).replace(hooks=hooks)
        return model.logits(params, buffers, pictures, ctx)[1]

    found = jitted(call)(params, buffers, pictures)
    each = [likeness_by_hand(wide(found.records[i]["w"])) for i in range(2)]
    assert abs(each[0] - each[1]) > 1e-3
    assert set(found.records[0]) == {"w"}
    assert float(found.metrics["adl"]) == pytest.approx(np.mean(each), abs=1e-5)
    assert float(found.losses["adl_loss"]) == pytest.approx(2 * np.mean(each), abs=1e-5)
    kept, before = (jax.tree.leaves(b["layers"]) for b in (found.buffers, buffers))
    for now, old in zip(kept, before, strict=True):
        assert now.shape == (2, K) and (np.abs(now - old) > 1e-6).all()


def test_the_loss_goes_with_other_options_windows_and_documents():
    """As an option behind a gate in a causal layer of packed documents."""
    adl = {"type": "tap_adl", "scales": 1, "threshold": 1.2}
    config = attention.Config(window=4, output=({"type": "gated_attention"}, adl))
    mixer = attention.Mixer(config, DIMS, rngs=nnx.Rngs(2))
    graph, arrays = nnx.split(mixer)
    ctx = Context(
        positions=jnp.asarray(place(SEGMENTS)),
        segment_ids=jnp.asarray(SEGMENTS),
        hooks=(Hook("w", "weights"), Hook("s", "scores")),
        train=True,
    )
    x = np.random.default_rng(1).normal(size=(2, 13, C)).astype(np.float32)
    _, found = jitted(lambda a, x, c: nnx.merge(graph, a)(x, c))(arrays, x, ctx)
    seen = np.asarray(found.records["s"] > -np.inf).any(1)
    order = np.arange(13)[:, None] - np.arange(13)
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS[:, :, None] != 0)
    np.testing.assert_array_equal(seen, same & (order >= 0) & (order < 4))
    expected = likeness_by_hand(wide(found.records["w"]), seen=seen, threshold=1.2)
    assert 0.05 < expected < 0.95
    assert float(found.metrics["adl"]) == pytest.approx(expected, abs=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": 0}, "scales must be at least 1; got 0"),
        ({"scales": 1, "pooling": "mean"}, "pooling needs a pool besides"),
        ({"diversity_weight": -1.0}, "diversity_weight must be at least 0; got -1.0"),
        ({"threshold": -1.0}, "threshold must be at least 0; got -1.0"),
        ({"threshold": 3.0, "diversity_weight": 0.0}, "threshold is that of the loss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        tap_adl.Config(**options)


def build(dims=ON_GRID, **options):
    given = {"type": "tap_adl", **options}
    return attention.Mixer(attention.Config(output=(given,)), dims, rngs=nnx.Rngs(0))


def test_a_plain_sequence_is_refused_where_the_layer_is_built():
    with pytest.raises(UserError, match="tap_adl: needs the grid of the model's tok"):
        build(DIMS)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"causal": True}, "tap_adl: is not causal; got causal=True"),
        ({"grid": None}, r"tap_adl: needs a grid of rank \(1, 2, 3\)"),
        ({"grid": (15,)}, "tap_adl: the layer is made for grids of one rank"),
        ({"grid": (3, 4)}, "tap_adl: tokens must be those of the grid"),
        ({"streams": {"s": np.zeros((1, 15, C))}}, "got the extra streams"),
    ],
)
def test_requests_that_pools_cannot_serve_are_refused(changes, text):
    ctx = Context(positions=jnp.zeros((1, 15), jnp.int32), causal=False, grid=GRID)
    x = jnp.zeros((1, 15, C))
    with pytest.raises(UserError, match=text):
        jax.eval_shape(lambda: build()(x, ctx.replace(**changes)))


def test_a_decoding_step_is_refused_where_there_are_pools():
    ctx = Context(positions=jnp.zeros((1, 1), jnp.int32))

    def step(x):
        mixer = build()
        return mixer.step(x, mixer.init_state(1, 15), ctx)

    with pytest.raises(UserError, match="tap_adl: has no decode form"):
        jax.eval_shape(step, jnp.zeros((1, 1, C)))


def test_a_mixer_without_weights_of_tokens_is_refused_the_loss():
    config = davit.Config(order="channel", output=({"type": "tap_adl", "scales": 1},))
    ctx = Context(positions=jnp.zeros((1, 15), jnp.int32), causal=False, grid=GRID)

    def call(x):
        mixer = davit.Mixer(config, ON_GRID, rngs=nnx.Rngs(0))
        return mixer(x, ctx.replace(train=True))[0]

    with pytest.raises(UserError, match="reads the layer's weights; got type='tap_adl"):
        jax.eval_shape(call, jnp.zeros((1, 15, C)))


def test_a_kernel_by_name_is_refused_where_there_is_a_loss():
    dims = dataclasses.replace(ON_GRID, kernel="blocked")
    with pytest.raises(UserError, match="got config.model.kernel=blocked. Set it to"):
        build(dims)
    jax.eval_shape(lambda: nnx.state(build(dims, diversity_weight=0.0)))
