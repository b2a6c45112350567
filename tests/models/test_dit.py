"""The diffusion transformer: what it computes, counts and refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnjax import nn
from attnjax.core import discovery, schema
from attnjax.core.errors import UserError
from attnjax.models import dit
from attnjax.models.layout import path_of
from attnjax.training import sharding

B, SIDE, CHANNELS, CLASSES = 2, 6, 2, 5
SMALL = dict(embed_dim=16, num_heads=2, num_layers=2, patch_size=2, mlp_dim=24)


def make(*, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES, **options):
    config = schema.build(dit.Config, dit.resolve({**SMALL, **options}))
    return dit.DiT(
        config,
        image_size=image_size,
        channels=channels,
        out_channels=2 * channels,
        num_classes=num_classes,
    )


def start(model, seed=0):
    """Arrays from numpy, away from the zeros of the first values."""
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(model.init, 0)
    params = jax.tree.map(
        lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), params
    )
    return params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), buffers)


def inputs(seed=1, side=SIDE):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(B, side, side, CHANNELS)).astype(np.float32)
    return images, np.asarray([3.0, 871.0], np.float32), np.asarray([4, CLASSES])


def predict(model, params, buffers, images, times, labels):
    @jax.jit
    def call(params, buffers):
        ctx = model.context(batch=len(images))
        return model.predict(params, buffers, images, times, labels, ctx)[0]

    return np.asarray(call(params, buffers))


# ---- the whole model against plain numpy


def plain_norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def affine(x, p):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, p, heads):
    def split(y):
        return y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    query, key, value = (split(affine(x, p[n])) for n in ("query", "key", "value"))
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = (weights @ value).transpose(0, 2, 1, 3).reshape(x.shape)
    return affine(y, p["out"])


def written_out(params, images, times, labels):
    """The released network, one formula after another, in float64."""
    patches = images.reshape(B, 3, 2, 3, 2, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    x = affine(patches.reshape(B, 9, -1).astype(np.float64), params["patches"])
    frequency = 10000.0 ** (-np.arange(4) / 4)
    row, column = np.divmod(np.arange(9), 3)
    halves = [
        f(place[:, None] * frequency)
        for place in (column, row)
        for f in (np.sin, np.cos)
    ]
    x = x + np.concatenate(halves, axis=1)
    turns = times[:, None] * np.exp(-math.log(10000.0) * np.arange(128) / 128)
    features = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    c = affine(silu(affine(features, params["time"]["hidden"])), params["time"]["out"])
    c = c + np.asarray(params["classes"]["table"], np.float64)[labels]
    layers = params["layers"]["group_0"]["sub_0"]
    for layer in range(2):
        p = jax.tree.map(lambda a, i=layer: np.asarray(a[i], np.float64), layers)
        six = np.split(affine(silu(c), p["modulation"]["linear"])[:, None], 6, -1)
        read = plain_norm(x) * (1 + six[1]) + six[0]
        x = x + six[2] * attention(read, p["mixer"], 2)
        read = plain_norm(x) * (1 + six[4]) + six[3]
        x = x + six[5] * affine(
            gelu_tanh(affine(read, p["mlp"]["up"])), p["mlp"]["down"]
        )
    shift, scale = np.split(
        affine(silu(c), params["final_modulation"]["linear"])[:, None], 2, -1
    )
    x = affine(plain_norm(x) * (1 + scale) + shift, params["head"])
    x = x.reshape(B, 3, 3, 2, 2, 2 * CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, SIDE, SIDE, 2 * CHANNELS)


def test_the_network_is_the_released_one():
    model = make()
    params, buffers = start(model)
    found = predict(model, params, buffers, *inputs())
    wanted = written_out(params, *inputs())
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


# ---- at the start


def test_at_the_start_it_predicts_zero_and_only_its_head_learns():
    model = make()
    params, buffers = model.init(0)
    images, times, labels = inputs()

    @jax.jit
    def loss(params):
        ctx = model.context(batch=B)
        found, _ = model.predict(params, buffers, images, times, labels, ctx)
        return jnp.sum(jnp.square(found - 1.0)), found

    (_, found), grads = jax.value_and_grad(loss, has_aux=True)(params)
    assert not np.any(found)
    moved = {
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if np.any(g)
    }
    assert moved == {"['head']['kernel']", "['head']['bias']"}


def test_at_the_start_every_layer_passes_its_input_on():
    model = make()
    params, buffers = model.init(0)
    images, times, labels = inputs()
    x = model.embed(params, images)
    ctx = model.context(batch=B)
    ctx = ctx.replace(
        condition=model.condition(params, times, model.encode(params, labels))
    )
    np.testing.assert_array_equal(model.run(params, buffers, x, ctx)[0], x)


@pytest.mark.parametrize(
    ("name", "fan_in", "fan_out"),
    [("mlp/up", 64, 96), ("mixer/query", 64, 192), ("mixer/out", 64, 64)],
)
def test_first_weights_spread_like_xaviers(name, fan_in, fan_out):
    model = make(embed_dim=64, mlp_dim=96, num_layers=4)
    params, _ = jax.jit(model.init)(0)
    part = params["layers"]["group_0"]["sub_0"]
    for step in name.split("/"):
        part = part[step]
    wanted = math.sqrt(2 / (fan_in + fan_out))
    assert np.std(part["kernel"]) == pytest.approx(wanted, rel=0.03)
    assert not np.any(part["bias"])


# ---- counting

# Parameters with the fixed table of positions, and GFLOPs (multiply-adds), at 256
# pixels (latents of 32 x 32 x 4) and 1000 classes: the released models'.
RELEASED = [
    ("S/2", 32_963_360, 6.06),
    ("B/2", 130_512_416, 23.01),
    ("L/2", 458_102_816, 80.71),
    ("XL/2", 675_129_632, 118.64),
    ("XL/4", 675_074_432, 29.05),
    ("XL/8", 675_683_072, 7.39),
]


@pytest.mark.parametrize(("size", "parameters", "gflops"), RELEASED)
def test_sizes_count_like_the_released_models(size, parameters, gflops):
    config = schema.build(dit.Config, dit.resolve({"name": "dit", "size": size}))
    model = dit.DiT(config, image_size=32, channels=4, out_channels=8, num_classes=1000)
    table = model.num_tokens * model.config.embed_dim
    assert model.parameter_count() + table == parameters
    assert model.flops() / 2e9 == pytest.approx(gflops, rel=2e-3)


# ---- tokens, labels, images


def test_patches_go_back_to_the_image_they_came_from():
    images, *_ = inputs()
    patches = nn.patchify(jnp.asarray(images), 2)
    np.testing.assert_array_equal(nn.unpatchify(patches, (3, 3), 2), images)


def test_without_positions_it_commutes_with_any_order_of_the_patches():
    model = make(positions="none")
    params, buffers = start(model)
    images, times, labels = inputs()
    order = np.random.default_rng(3).permutation(9)

    def moved(x):
        patches = nn.patchify(jnp.asarray(x), 2)[:, order]
        return np.asarray(nn.unpatchify(patches, (3, 3), 2))

    found = predict(model, params, buffers, moved(images), times, labels)
    wanted = moved(predict(model, params, buffers, images, times, labels))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    placed = make()
    assert not np.allclose(
        predict(placed, params, buffers, moved(images), times, labels),
        moved(predict(placed, params, buffers, images, times, labels)),
        atol=1e-2,
    )


def test_time_and_class_change_every_pixel_of_their_row_alone():
    model = make()
    params, buffers = start(model)
    images, times, labels = inputs()
    base = predict(model, params, buffers, images, times, labels)
    for other in ((times + [0, 1], labels), (times, labels - [0, 1])):
        found = predict(model, params, buffers, images, *other)
        np.testing.assert_array_equal(found[0], base[0])
        assert np.all(found[1] != base[1])


# Windows that divide a grid of 3 x 3.
FITTING = {"halonet": {"block": 3, "halo": 1}, "maxvit": {"window": 3}}


def test_every_bidirectional_mixer_of_the_catalog_is_a_layer():
    """All of them in one model, traced in training."""
    found = {name: discovery.find(name).SPEC for name in discovery.names()}
    names = [n for n, spec in found.items() if spec.capabilities.bidirectional]
    model = make(
        layers=tuple(names), num_layers=len(names), positions="rope", mixers=FITTING
    )

    def call(key):
        params, buffers = model.init(0)
        images, times, labels = inputs()
        ctx = model.context(batch=B, prng_key=key, train=True)
        return model.predict(params, buffers, images, times, labels, ctx)

    found, _ = jax.eval_shape(call, jax.random.key(0))
    assert found.shape == (B, SIDE, SIDE, 2 * CHANNELS)


def test_labels_are_dropped_at_their_rate():
    model = make(label_dropout=0.25)
    labels = jnp.arange(4000) % CLASSES
    dropped = np.asarray(model.drop_labels(labels, jax.random.key(0)))
    gone = dropped == model.null_label
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(dropped[~gone], np.asarray(labels)[~gone])
    sure = make(label_dropout=0.0)
    assert sure.null_label is None and sure.num_labels == CLASSES
    np.testing.assert_array_equal(sure.drop_labels(labels, jax.random.key(0)), labels)


def test_positions_of_a_trained_grid_are_resampled():
    small, large = make(), make(image_size=12, positions_grid=3)
    params, _ = start(small)
    images, *_ = inputs(side=12)
    bare = make(image_size=12, positions="none").embed(params, images)
    added = (large.embed(params, images) - bare)[0].reshape(6, 6, 16)
    # The mean of four places is close to the one that they cover.
    covered = np.asarray(added).reshape(3, 2, 3, 2, 16).mean((1, 3)).reshape(9, 16)
    table = nn.sincos_2d((3, 3), 16, reaches_end=False)
    assert np.abs(covered - table).max() < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "Ti/2"}, "must be one of S, B, L, XL, a slash .* got 'Ti/2'"),
        ({"label_dropout": 1.0}, "label_dropout: must be in .0, 1.; got 1.0"),
        ({"time_features": 7}, "time_features: must be even.*got 7"),
        ({"scale_out_init": True}, "scale_out_init=true, init_std=none"),
        ({"zero_centered_norm": True}, "the norms of a dit have no scales"),
        ({"embed_dim": 18}, "must be a multiple of 4.*positions=sincos; got 18"),
        ({"image_size": 7}, "must divide config.data.image_size; got patch_size=2"),
        ({"num_classes": 0}, "num_classes must be at least 1; got num_classes=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_images_of_another_size_are_refused():
    model = make()
    params, buffers = start(model)
    images, times, labels = inputs(side=8)
    ctx = model.context(batch=B)
    with pytest.raises(UserError, match="positions_grid=3"):
        model.predict(params, buffers, images, times, labels, ctx)


# ---- on several devices


def test_every_large_array_has_logical_axes():
    """Of all arrays only vectors stay whole."""
    params, _ = jax.eval_shape(make().init, 0)
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        axes = sharding.logical_axes(path, leaf.ndim)
        found["/".join(path)] = [axis for axis in axes if axis != "layers"]
    assert found["final_modulation/linear/kernel"] == ["embed", None]
    assert found["classes/table"] == [None, "embed"]
    whole = {path for path, axes in found.items() if len(axes) > 1 and not any(axes)}
    assert not whole


def test_a_mesh_changes_no_result():
    """Rows over data and fsdp, parameters over fsdp and tensor."""
    with jax.enable_x64(True):
        model = make(dtype="float64", param_dtype="float64", num_layers=1)
        params, buffers = start(model)
        params = jax.tree.map(np.float64, params)
        rng = np.random.default_rng(2)
        images = rng.normal(size=(8, SIDE, SIDE, CHANNELS))
        times, labels = rng.uniform(0, 999, size=8), np.arange(8) % CLASSES
        mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2, tensor=2))
        rows = sharding.batch_sharding(mesh, leading=0)
        places = sharding.shardings(params, mesh, sharding.resolve_rules({}))
        layer = places["layers"]["group_0"]["sub_0"]
        assert layer["modulation"]["linear"]["kernel"].spec == P(None, "fsdp", None)
        for name in ("time", "classes", "final_modulation", "patches", "head"):
            specs = [place.spec for place in jax.tree.leaves(places[name])]
            assert any("fsdp" in spec for spec in specs), name

        def loss(rows):
            def call(params, *batch):
                ctx = model.context(batch=8, rows=rows)
                found, _ = model.predict(params, buffers, *batch, ctx)
                return jnp.square(found).mean()

            return jax.jit(jax.value_and_grad(call))

        batch = (images, times, labels)
        wanted = loss(None)(params, *batch)
        out = loss(rows)(jax.device_put(params, places), *jax.device_put(batch, rows))
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10 * max(1.0, np.abs(b).max()))
