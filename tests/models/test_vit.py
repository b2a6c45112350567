"""The vision transformer: what it computes, counts and refuses."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import nn
from attnjax.core import discovery, schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.core.userfile import run_file
from attnjax.models import vit
from attnjax.models.layout import path_of
from attnjax.training import sharding

B, SIDE, CHANNELS, CLASSES = 2, 6, 2, 5
SMALL = dict(embed_dim=16, num_heads=2, num_layers=2, patch_size=2, mlp_dim=24)


def make(*, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES, **options):
    config = schema.build(vit.Config, vit.resolve({**SMALL, **options}))
    return vit.ViT(
        config, image_size=image_size, channels=channels, num_classes=num_classes
    )


def start(model, seed=0, dtype=np.float32):
    """Arrays from numpy, away from the constant starts of scales and biases."""
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(model.init, 0)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * rng.normal(size=leaf.shape)).astype(dtype)

    params = jax.tree_util.tree_map_with_path(one, params)
    return params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)


def images_of(side=SIDE, seed=1, batch=B):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, side, side, CHANNELS)).astype(np.float32)


def logits_of(model, params, buffers, images, **context):
    """[B, classes], compiled."""

    @jax.jit
    def call(params, buffers, images):
        ctx = model.context(batch=len(images), **context)
        return model.logits(params, buffers, images, ctx)[0]

    return np.asarray(call(params, buffers, images))


# ---- the whole model against plain numpy


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * p["scale"] + p["bias"]


def affine(x, p):
    return x @ p["kernel"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def turned(x, grid, extra, theta):
    """RoPE on a grid: [T, heads, D] as D / 2 complex numbers, half for each axis."""
    half, share = x.shape[-1] // 2, x.shape[-1] // 4
    frequency = theta ** (-np.arange(share) / share)
    places = [(0, 0)] * extra + list(np.ndindex(grid))
    angle = np.array([[c * f for c in place for f in frequency] for place in places])
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def by_hand(model, params, image):
    """One image's logits in float64, written from the description of the parts."""
    c, p = model.config, jax.tree.map(np.float64, params)
    tokens = [
        affine(image[i : i + 2, j : j + 2].reshape(-1), p["patches"])
        for i in range(0, SIDE, 2)
        for j in range(0, SIDE, 2)
    ]
    x = np.stack(tokens)
    head = []
    if c.pool == "class_token":
        head.append(p["class_token"]["table"][0])
    if c.positions == "learned":
        table = p["position_embedding"]["table"]
        if head:
            head[0], table = head[0] + table[0], table[1:]
        x = x + table
    if c.registers:
        head += list(p["registers"]["table"])
    x = np.stack(head + list(x)) if head else x
    layers = p["layers"]["group_0"]["sub_0"]
    for i in range(2):
        x = layer_by_hand(
            model, jax.tree.map(lambda a, i=i: a[i], layers), x, len(head)
        )
    x = norm(x, p["final_norm"])
    if c.pool == "class_token":
        pooled = x[0]
    elif c.pool == "mean":
        pooled = x[len(head) :].mean(0)
    else:
        places, query = x[len(head) :], p["pool"]["query"]
        weights = softmax(query @ places.T / math.sqrt(16))
        value = (places @ p["pool"]["value"]["kernel"]).reshape(9, len(query), -1)
        pooled = np.einsum("mn,nme->me", weights, value).reshape(-1)
    if c.head_hidden:
        pooled = np.tanh(affine(pooled, p["head_hidden"]))
    return affine(pooled, p["head"])


def layer_by_hand(model, p, x, extra):
    c, mixer = model.config, p["mixer"]
    inner = norm(x, p["norm_mixer"])
    q, k, v = (
        affine(inner, mixer[name]).reshape(len(x), 2, 8)
        for name in ("query", "key", "value")
    )
    if c.positions == "rope":
        q, k = (turned(a, model.grid, extra, c.rope.theta) for a in (q, k))
    weights = softmax(np.einsum("thd,shd->hts", q, k) / math.sqrt(8))
    y = np.einsum("hts,shd->thd", weights, v).reshape(len(x), 16)
    y = affine(y, mixer["out"])
    x = x + y * p.get("layer_scale_mixer", 1.0)
    y = affine(norm(x, p["norm_mlp"]), p["mlp"]["up"])
    y = affine(gelu(y), p["mlp"]["down"])
    return x + y * p.get("layer_scale_mlp", 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"registers": 2},
        {"positions": "rope", "pool": "mean", "registers": 1, "layer_scale": 0.1},
        {
            "positions": "none",
            "pool": "attentive",
            "pool_queries": 4,
            "head_hidden": 7,
        },
    ],
    ids=["class token, learned", "mean, rope", "attentive, none"],
)
def test_the_model_is_its_description(options):
    with jax.enable_x64(True):
        model = make(**options, dtype="float64", param_dtype="float64")
        params, buffers = start(model, dtype=np.float64)
        images = images_of().astype(np.float64)
        out = logits_of(model, params, buffers, images)
    assert out.dtype == np.float64
    wanted = [by_hand(model, params, image) for image in images]
    np.testing.assert_allclose(out, wanted, rtol=1e-10, atol=1e-10)


# ---- what it depends on


def test_without_positions_the_order_of_patches_does_not_matter():
    order = np.random.default_rng(3).permutation(9)
    images = images_of()
    cut = images.reshape(B, 3, 2, 3, 2, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    cut = cut.reshape(B, 9, 2, 2, CHANNELS)[:, order].reshape(B, 3, 3, 2, 2, CHANNELS)
    mixed = cut.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    assert not np.allclose(mixed, images)
    for positions, is_same in (("none", True), ("sincos", False)):
        model = make(positions=positions, pool="mean", num_layers=1)
        params, buffers = start(model)
        both = np.concatenate([images, mixed])
        out = logits_of(model, params, buffers, both)
        assert np.allclose(out[:B], out[B:], atol=1e-5) == is_same


def test_rotary_scores_of_equal_patches_depend_on_their_distance_alone():
    """A constant image: moving query and key together changes no score."""
    model = make(positions="rope", registers=1, num_layers=1)
    params, buffers = start(model)
    hook = Hook("scores", "scores", layers=(0,))

    @jax.jit
    def call(params, images):
        ctx = model.context(batch=1).replace(hooks=(hook,))
        return model.hidden(params, buffers, images, ctx)[1].records[0]["scores"]

    image = np.tile(images_of(2, batch=1), (1, 3, 3, 1))
    scores = np.asarray(call(params, image))[0, :, 2:, 2:].reshape(2, 3, 3, 3, 3)
    moved = scores[:, 1:, 1:, 1:, 1:]
    np.testing.assert_allclose(moved, scores[:, :-1, :-1, :-1, :-1], atol=1e-5)
    assert np.abs(scores[:, 0, 0, 0, 1] - scores[:, 0, 0, 1, 0]).min() > 1e-3


def test_windows_keep_seeing_the_registers():
    near = {"type": "attention", "window": 1}
    model = make(layers="near", mixers={"near": near}, registers=1, pool="mean")
    params, buffers = start(model)

    @jax.jit
    def moved(params, images):
        def tokens(register):
            changed = params | {"registers": {"table": register}}
            ctx = model.context(batch=1)
            return model.hidden(changed, buffers, images, ctx)[0][0, 1:].sum(-1)

        return jax.jacobian(tokens)(params["registers"]["table"])

    change = np.asarray(moved(params, images_of(batch=1)))
    assert change.shape == (9, 1, 16)
    assert (np.abs(change).max(axis=(1, 2)) > 1e-4).all()


def test_registers_change_no_shape_of_what_comes_out():
    for registers in (0, 3):
        model = make(registers=registers)
        params, buffers = jax.eval_shape(model.init, 0)
        images = jax.ShapeDtypeStruct((B, SIDE, SIDE, CHANNELS), jnp.float32)

        def call(params, buffers, images, model=model):
            ctx = model.context(batch=B)
            logits, _ = model.logits(params, buffers, images, ctx)
            return logits, model.features(params, buffers, images, ctx)[0]

        logits, features = jax.eval_shape(call, params, buffers, images)
        assert (logits.shape, features.shape) == ((B, CLASSES), (B, 16))


def test_drop_path_leaves_out_whole_branches_of_some_images():
    """The rate grows from 0 at the first of two layers, so of equal images there are
    four kinds, by which branches of the last layer they keep."""
    model, plain = (make(drop_path=rate) for rate in (0.5, 0.0))
    params, buffers = start(model)
    images = np.repeat(images_of(batch=1), 64, axis=0)

    @jax.jit
    def call(params, key):
        ctx = model.context(batch=64, prng_key=key, train=True)
        return model.logits(params, buffers, images, ctx)[0]

    first, again, other = (
        np.asarray(call(params, jax.random.key(seed))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    kinds, counts = np.unique(first.round(4), axis=0, return_counts=True)
    assert len(kinds) == 4 and counts.min() >= 6
    out = logits_of(model, params, buffers, images)
    trained = logits_of(plain, params, buffers, images, train=True)
    np.testing.assert_allclose(out, trained, atol=1e-5)
    assert not (np.abs(kinds - out[0].round(4)) < 1e-3).all(axis=1).any()


def test_bfloat16_stays_near_float32_and_logits_are_wide():
    params, buffers = start(make(pool="mean"))
    out = {}
    for dtype in ("float32", "bfloat16"):
        model = make(pool="mean", dtype=dtype)
        out[dtype] = logits_of(model, params, buffers, images_of())
    assert out["bfloat16"].dtype == np.float32
    np.testing.assert_allclose(out["bfloat16"], out["float32"], atol=0.1)


def test_the_head_starts_at_zero_or_small():
    names = ("head", "patches")
    for std in (0.0, 0.5):
        model = make(head_std=std, num_layers=1)
        params = jax.jit(lambda m=model: {n: m.init(0)[0][n] for n in names})()
        head = np.asarray(params["head"]["kernel"])
        assert not params["head"]["bias"].any()
        assert head.std() == pytest.approx(std, abs=0.15)
        spread = np.asarray(params["patches"]["kernel"]).std()
        assert spread == pytest.approx(8**-0.5, rel=0.3)


def test_a_class_token_that_nothing_pools_stays_in_the_encoder():
    """So a probe reads the patches of a model that was trained on its class token."""
    trained = make(registers=1)
    probe = make(registers=1, class_token=True, pool="attentive", pool_queries=4)
    params, buffers = start(probe)
    own = {name: params[name] for name in jax.eval_shape(trained.init, 0)[0]}
    images = images_of()

    def tokens(model, params):
        ctx = model.context(batch=B)
        call = jax.jit(lambda p, x: model.hidden(p, buffers, x, ctx)[0])
        return call(params, images)

    np.testing.assert_array_equal(tokens(probe, params), tokens(trained, own))


@pytest.mark.parametrize("pool", ["class_token", "mean"])
def test_a_probe_trains_its_pool_and_head_on_the_layers_of_the_run(pool):
    given = {"model": vit.resolve(SMALL | {"embed_dim": 64, "pool": pool}), "data": {}}
    path = Path(__file__).parents[2] / "configs" / "vit" / "probe.py"
    probe = run_file(str(path), owner="--config", module_name="probe").probe_of(given)
    models = [
        vit.ViT(
            schema.build(vit.Config, vit.resolve(model)),
            image_size=SIDE,
            channels=CHANNELS,
            num_classes=CLASSES,
        )
        for model in (given["model"], probe["model"])
    ]
    trained, found = (jax.eval_shape(model.init, 0)[0] for model in models)
    assert models[0].num_tokens == models[1].num_tokens
    assert {k: v for k, v in found.items() if k != "pool"} == trained
    names = [
        "/".join(path_of(p)) for p, _ in jax.tree_util.tree_leaves_with_path(found)
    ]
    trains = {name for name in names if not re.search(probe["optim"]["freeze"], name)}
    assert trains == {"pool/query", "pool/value/kernel", "head/kernel", "head/bias"}


def test_a_normed_head_reads_the_batch_in_training_and_its_memory_after():
    model = make(head_norm="batch", num_layers=1)
    params, buffers = start(model)
    buffers["head_norm"] = nn.batch_statistics(16)
    images = images_of(batch=6)

    @jax.jit
    def call(params, buffers, images):
        results = []
        for train in (True, False):
            ctx = model.context(batch=6, prng_key=jax.random.key(0), train=train)
            pooled, _ = model.features(params, buffers, images, ctx)
            logits, out = model.logits(params, buffers, images, ctx)
            results.append((pooled, logits, out.buffers))
        return results

    (pooled, trained, after), (_, evaluated, same) = call(params, buffers, images)
    assert jax.tree.structure(after) == jax.tree.structure(
        jax.eval_shape(model.init, 0)[1]
    )
    head = params["head"]
    for logits, running, train in ((trained, after, True), (evaluated, same, False)):
        normed, wanted = nn.batch_norm(pooled, buffers["head_norm"], train=train)
        np.testing.assert_allclose(logits, affine(normed, head), atol=1e-4)
        for name, value in wanted.items():
            np.testing.assert_allclose(running["head_norm"][name], value, atol=1e-5)


# ---- images of another size than the positions'


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_positions_are_resampled_for_images_of_another_size(positions):
    trained = make(positions=positions)
    model = make(positions=positions, positions_grid=3, image_size=8)
    assert (trained.grid, model.grid) == ((3, 3), (4, 4))
    assert model.positions_grid == (3, 3)
    assert jax.eval_shape(model.init, 0) == jax.eval_shape(trained.init, 0)
    params, _ = start(model)
    images = images_of(8)
    bare = make(positions="none", image_size=8)
    rest = {k: v for k, v in params.items() if k != "position_embedding"}
    added = model.embed(params, images) - bare.embed(rest, images)
    if positions == "sincos":
        wanted = nn.sincos_2d((4, 4), 16, trained=(3, 3))
        assert not added[:, 0].any()
    else:
        table = params["position_embedding"]["table"]
        wanted = nn.resample_table(jnp.asarray(table[1:]), (3, 3), (4, 4))
        np.testing.assert_allclose(added[0, 0], table[0], atol=1e-5)
    np.testing.assert_allclose(added[0, 1:], wanted, atol=1e-5)


# ---- what a layer is told


def test_the_grid_that_mixers_see_is_that_of_the_patches():
    model = make(registers=2, positions="rope")
    ctx = model.context(batch=3)
    assert ctx.grid == model.grid == model.dims.grid == (3, 3)
    assert ctx.extra_tokens == model.dims.prefix_tokens == 3
    assert ctx.positions.shape == (3, model.num_tokens) == (3, 12)
    assert not ctx.causal and not ctx.train
    assert (model.dims.rope.grid, model.dims.rope.extra_tokens) == ((3, 3), 3)


# Windows that divide a grid of 3 x 3.
FITTING = {"halonet": {"block": 3, "halo": 1}, "maxvit": {"window": 3}}


def bidirectional():
    names = discovery.names()
    return [n for n in names if discovery.find(n).SPEC.capabilities.bidirectional]


def test_every_bidirectional_mixer_of_the_catalog_is_a_layer():
    """All of them in one model behind a register, traced in training."""
    names = bidirectional()
    assert len(names) >= 15
    sizes = dict(num_layers=len(names), positions="rope", registers=1)
    model = make(layers=tuple(names), pool="mean", mixers=FITTING, **sizes)
    params, buffers = jax.eval_shape(model.init, 0)
    images = jax.ShapeDtypeStruct((B, SIDE, SIDE, CHANNELS), jnp.float32)

    def call(params, buffers, images, key):
        ctx = model.context(batch=B, prng_key=key, train=True)
        return model.logits(params, buffers, images, ctx)

    logits, out = jax.eval_shape(call, params, buffers, images, jax.random.key(0))
    assert logits.shape == (B, CLASSES)
    assert jax.tree.structure(out.buffers) == jax.tree.structure(buffers)


def test_extra_streams_run_beside_the_images():
    model = make(registers=1)
    params, buffers = jax.eval_shape(model.init, 0)
    images = jax.ShapeDtypeStruct((B, SIDE, SIDE, CHANNELS), jnp.float32)

    def call(params, buffers, images, start):
        buffers = buffers | {"streams": {"more": start}}
        ctx = model.context(batch=B)
        return model.hidden(params, buffers, images, ctx)[1]

    start = jax.ShapeDtypeStruct((1, 99, 16), jnp.float32)
    out = jax.eval_shape(call, params, buffers, images, start)
    assert out.streams["more"].shape == (1, model.num_tokens, 16)
    tokens = jax.ShapeDtypeStruct((1, 99), jnp.int32)
    with pytest.raises(UserError, match="needs a table of tokens, which an image"):
        jax.eval_shape(call, params, buffers, images, tokens)


def test_equal_parameters_are_those_of_attention_without_registers():
    baseline = make().parameter_count()
    for options in (dict(layers="gated_attention"), dict(registers=7)):
        model = make(**options, params="match")
        assert model.matched.target == baseline
        assert model.parameter_count() == model.matched.parameters
        # A unit of width in both MLPs, an inner map with a bias and one out.
        assert abs(model.matched.difference) <= (2 * 16 + 1) * 2 / 2


# ---- on several devices


def test_every_large_array_has_logical_axes():
    """Of all arrays only vectors, factors and the grid's positions stay whole."""
    options = dict(layer_scale=1.0, registers=1, head_hidden=8)
    found = {}
    for pool in ("class_token", "attentive"):
        queries = 4 if pool == "attentive" else None
        model = make(**options, pool=pool, pool_queries=queries)
        params, _ = jax.eval_shape(model.init, 0)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
            path = path_of(key_path)
            axes = sharding.logical_axes(path, leaf.ndim)
            found["/".join(path)] = [axis for axis in axes if axis != "layers"]
    assert found["patches/kernel"] == [None, "embed"]
    assert found["class_token/table"] == [None, "embed"]
    assert found["registers/table"] == [None, "embed"]
    assert found["position_embedding/table"] == [None, "embed"]
    assert found["pool/query"] == [None, "embed"]
    assert found["pool/value/kernel"] == ["embed", None]
    assert found["head/kernel"] == ["embed", "vocab"]
    assert found["head_hidden/kernel"] == ["embed", None]
    whole = {path for path, axes in found.items() if len(axes) > 1 and not any(axes)}
    assert not whole


def test_a_mesh_changes_no_result():
    """Rows over data and fsdp, parameters over fsdp and tensor."""
    with jax.enable_x64(True):
        wide = dict(dtype="float64", param_dtype="float64", num_classes=4)
        wide |= dict(pool="attentive", pool_queries=4, registers=1, num_layers=1)
        model = make(**wide)
        params, buffers = start(model, dtype=np.float64)
        images = images_of(batch=8).astype(np.float64)
        sizes = sharding.Config(data=2, fsdp=2, tensor=2)
        mesh = sharding.make_mesh(sizes)
        rows = sharding.batch_sharding(mesh, leading=0)
        places = sharding.shardings(params, mesh, sharding.resolve_rules({}))
        assert places["patches"]["kernel"].spec == P(None, "fsdp")
        assert places["pool"]["query"].spec == P(None, "fsdp")

        def loss(rows):
            def call(params, images):
                ctx = model.context(batch=8, rows=rows)
                logits, _ = model.logits(params, buffers, images, ctx)
                return jax.nn.log_softmax(logits)[:, 0].mean()

            return jax.jit(jax.value_and_grad(call))

        wanted = loss(None)(params, images)
        spread = jax.device_put(params, places), jax.device_put(images, rows)
        out = loss(rows)(*spread)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)
