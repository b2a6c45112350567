"""The pyramid of stages: what it computes, counts and refuses."""

import math
import re

import jax
import numpy as np
import pytest

from attnjax.core import discovery, schema
from attnjax.core.context import Hook
from attnjax.core.errors import UserError
from attnjax.models import pyramid
from attnjax.models.layout import named, path_of
from attnjax.training import sharding

B, SIDE, CHANNELS, CLASSES = 2, 8, 2, 5
SMALL = dict(embed_dim=8, num_heads=2, depths=(1, 1), patch_size=2, remat="none")
DUAL = {
    "spatial": {"type": "davit", "order": "spatial", "mask_padding": False},
    "channel": {"type": "davit", "order": "channel"},
}


def make(*, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES, **options):
    options = options if "size" in options else SMALL | options
    config = schema.build(pyramid.Config, pyramid.resolve(options))
    return pyramid.Pyramid(
        config, image_size=image_size, channels=channels, num_classes=num_classes
    )


def start(model, dtype=np.float32):
    """Arrays from numpy, away from the constant starts of scales and biases."""
    rng = np.random.default_rng(0)
    params, buffers = jax.eval_shape(model.init, 0)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * rng.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params), buffers


def images_of(batch=B, side=SIDE):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, side, side, CHANNELS))


# ---- the whole model against plain numpy


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * p["scale"] + p["bias"]


def affine(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def windows(x, *, size, stride, padding):
    """[H, W, C] -> [H', W', size * size, C], a window of places for each output."""
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    count = (len(x) - size) // stride + 1
    places = [(i, j) for i in range(size) for j in range(size)]
    found = np.empty((count, count, len(places), x.shape[-1]))
    for a, b in np.ndindex(count, count):
        for n, (i, j) in enumerate(places):
            found[a, b, n] = x[a * stride + i, b * stride + j]
    return found


def convolved(x, p, **shape):
    seen = windows(x, **shape)
    return affine(seen.reshape(*seen.shape[:2], -1), p)


def placed(x, p):
    """x + the depthwise convolution of 3 x 3 places."""
    seen = windows(x, size=3, stride=1, padding=1)
    return x + np.einsum("abnc,nc->abc", seen, p["conv_kernel"]) + p["conv_bias"]


def normed(x, p, name):
    """x behind the norm of this name, where the layer has it."""
    return norm(x, p[name]) if name in p else x


def layer_by_hand(p, x, heads, cpe):
    x = placed(x, p["conv_mixer"]) if cpe else x
    inner, mixer = normed(x, p, "norm_mixer").reshape(-1, x.shape[-1]), p["mixer"]
    q, k, v = (
        affine(inner, mixer[name]).reshape(len(inner), heads, -1)
        for name in ("query", "key", "value")
    )
    scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("hts,shd->thd", weights, v).reshape(inner.shape)
    x = x + normed(affine(y, mixer["out"]).reshape(x.shape), p, "post_norm_mixer")
    x = placed(x, p["conv_mlp"]) if cpe else x
    inner = affine(normed(x, p, "norm_mlp"), p["mlp"]["up"])
    return x + normed(affine(gelu(inner), p["mlp"]["down"]), p, "post_norm_mlp")


def by_hand(model, params, image):
    """One image's logits in float64, written from the description of the parts."""
    c, p = model.config, jax.tree.map(np.float64, params)
    overlap, half = dict(size=3, stride=2, padding=1), dict(size=2, stride=2, padding=0)
    x = image
    for i in range(2 if c.stem == "conv" else 1):
        x = gelu(x) if i else x
        x = convolved(x, p["stem"][f"conv_{i}"], **overlap)
        x = norm(x, p["stem"][f"norm_{i}"])
    for i, heads in enumerate(c.stage_heads):
        if i:
            scale, conv = (
                p["downsampling"][f"{name}_{i}"] for name in ("norm", "conv")
            )
            shape = overlap if c.downsampling == "overlap" else half
            if c.downsampling == "merge":
                assert "bias" not in conv
                x = norm(convolved(x, conv, **shape), scale)
            else:
                x = convolved(norm(x, scale), conv, **shape)
        layer = jax.tree.map(lambda a: a[0], p["layers"][f"group_{i}"]["sub_0"])
        x = layer_by_hand(layer, x, heads, c.cpe)
    x = x.reshape(-1, x.shape[-1])
    if c.pool == "mean_norm":
        pooled = norm(x.mean(0), p["final_norm"])
    else:
        pooled = norm(x, p["final_norm"]).mean(0)
    if c.head_hidden:
        pooled = np.tanh(affine(pooled, p["head_hidden"]))
    return affine(pooled, p["head"])


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "overlap", "downsampling": "overlap", "cpe": True},
        {"stem": "conv", "patch_size": 4, "pool": "norm_mean", "head_hidden": 7},
        {"stem": "overlap", "downsampling": "merge", "post_norm": "only"},
    ],
    ids=["overlap, positions", "halving, hidden layer", "merging, norms behind"],
)
def test_the_model_is_its_description(options):
    with jax.enable_x64(True):
        model = make(**options, dtype="float64", param_dtype="float64")
        params, buffers = start(model, np.float64)
        images = images_of()

        @jax.jit
        def logits(params, images):
            ctx = model.context(batch=B)
            return model.logits(params, buffers, images, ctx)[0]

        out = np.asarray(logits(params, images))
    assert out.dtype == np.float64
    wanted = [by_hand(model, params, image) for image in images]
    np.testing.assert_allclose(out, wanted, rtol=1e-9, atol=1e-9)


# ---- stages


def test_layers_have_absolute_numbers_and_the_grid_of_their_stage():
    """A pixel moves its window alone, until places of windows are made one."""
    spatial = {"type": "davit", "order": "spatial", "window": 2}
    model = make(
        layers="spatial",
        depths=(2, 1),
        mixers={"spatial": spatial},
        image_size=8,
        patch_size=1,
    )
    assert [stage.grid for stage in model.stages] == [(8, 8), (4, 4)]
    assert [stage.dims.embed_dim for stage in model.stages] == [8, 16]
    assert [stage.dims.num_heads for stage in model.stages] == [2, 4]
    # Equal neighbours in two stages are no group.
    assert model.layout.groups == ((("spatial",), 2), (("spatial",), 1))
    assert {stage.block_dims.num_layers for stage in model.stages} == {3}
    params, buffers = start(model)
    assert "layers/002/mlp/up/kernel" in named(params["layers"], model.layout)
    hook = Hook("out", "hidden")

    @jax.jit
    def hidden(images):
        ctx = model.context(batch=len(images)).replace(hooks=(hook,))
        return model.hidden(params, buffers, images, ctx)[1].records

    one = images_of(batch=1).astype(np.float32)
    two = one.copy()
    two[0, 3, 5] += 1.0  # In the window of rows 2, 3 and columns 4, 5.
    records = hidden(np.concatenate([one, two]))
    assert sorted(records) == [0, 1, 2]
    fields = {8: (slice(2, 4), slice(4, 6)), 4: (slice(0, 2), slice(2, 4))}
    for record in records.values():
        before, after = np.asarray(record["out"])
        side = math.isqrt(len(before))
        moved = np.abs(after - before).max(-1).reshape(side, side) > 1e-5
        wanted = np.zeros((side, side), bool)
        wanted[fields[side]] = True
        np.testing.assert_array_equal(moved, wanted)


@pytest.mark.parametrize(("size", "parameters"), [("T", 28_360_168), ("B", 87_954_408)])
def test_dual_attention_has_the_published_parameters(size, parameters):
    """Ding et al., arXiv 2204.03645: their released models at 1000 classes."""
    model = make(
        size=size,
        layers="spatial channel",
        mixers=DUAL,
        stem="overlap",
        cpe=True,
        image_size=224,
        channels=3,
        num_classes=1000,
    )
    assert [stage.grid[0] for stage in model.stages] == [56, 28, 14, 7]
    assert model.parameter_count() == parameters


def test_one_ratio_of_the_mlps_makes_up_for_a_gate():
    plain = make(mlp_dim=32)
    gated = make(layers=["attention", "gated_attention"], mlp_dim=32, params="match")
    found = gated.matched
    assert found.target == plain.parameter_count()
    assert found.parameters == gated.parameter_count() < found.target + 60
    widths = [stage.block_dims.mlp_dim for stage in gated.stages]
    assert widths == [found.mlp_dim, 2 * found.mlp_dim] != [32, 64]
    again = make(layers=["attention", "gated_attention"], mlp_dim=found.mlp_dim)
    assert again.parameter_count() == found.parameters


def test_flops_are_those_of_its_products():
    model = make(stem="overlap", downsampling="overlap", cpe=True, mlp_dim=0)
    layers = sum(stage.layer_flops(stage.num_tokens) for stage in model.stages)
    stem, down = 16 * 9 * CHANNELS * 8, 4 * 9 * 8 * 16
    positions = 9 * (16 * 8 + 4 * 16)
    assert model.flops() == layers + 2 * (stem + down + positions + 16 * CLASSES)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 0)}, "depths: must be at least 1 each; got [1, 0]"),
        (
            {"widths": (8, 16, 32)},
            "widths: must have an entry for each of the 2 stages",
        ),
        ({"heads": (2,)}, "heads: must have an entry for each of the 2 stages"),
        ({"widths": (12, 24)}, "embed_dim: must be the first of widths; got 8"),
        ({"num_layers": 3}, "num_layers: must be the sum of depths; got 3"),
        ({"layers": ["attention"]}, "a list has one schedule for each stage; got 1"),
        ({"layers": "attention*2"}, "depths: stage 1 must hold its schedule a whole"),
        (
            {"heads": (2, 3)},
            "stage 2 of 2 (width 16): config.model.num_heads: must div",
        ),
        (
            {"stem": "conv", "patch_size": 3},
            "patch_size: must be 2, 4, 8, ... for stem",
        ),
        (
            {"stem": "conv", "patch_size": 4, "embed_dim": 7, "num_heads": 1},
            "embed_dim: must be a multiple of 2 for stem=conv",
        ),
        ({"image_size": 6}, "image_size: must be a multiple of all strides together"),
        ({"drop_path": 1.0}, "drop_path: must be in [0, 1); got 1.0"),
        (
            {"positions": "rope", "head_dim": 2},
            "config.model.head_dim: two axes turn four",
        ),
        (
            {"positions": "anchored", "downsampling": "overlap"},
            "downsampling: positions=anchored needs patches beside one another",
        ),
        ({"embed_dim": 0}, "embed_dim: must be at least 1; got 0"),
        ({"num_classes": 0}, "pyramid: num_classes must be at least 1; got"),
        (
            {"layers": "maxvit", "mixers": {"maxvit": {"window": 4}}},
            "stage 2 of 2 (width 16): maxvit: window",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**options)


def test_a_mixer_with_a_residual_stream_of_its_own_is_refused(monkeypatch):
    def streams(config, dims, prng_key):
        return {"side": jax.numpy.zeros((1, dims.max_len, dims.embed_dim))}

    attention = discovery.find("attention")
    monkeypatch.setattr(attention, "streams", streams, raising=False)
    with pytest.raises(UserError, match=r"stage 1 of 2 .*an extra residual stream has"):
        make()


def test_kernels_of_stem_and_downsampling_are_split_by_their_outputs():
    params, _ = jax.eval_shape(make(stem="conv", head_hidden=8).init, 0)
    whole = set()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        axes = [a for a in sharding.logical_axes(path, leaf.ndim) if a != "layers"]
        if len(axes) > 1 and not any(axes):
            whole.add(path)
    assert not whole
    assert {"stem", "downsampling"} <= set(sharding.ENDS)
