"""MBConvs in a pyramid: where they stand, their state, and MaxViT's parameters."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax import nn
from attnjax.core import schema
from attnjax.core.config import load_file
from attnjax.core.errors import UserError
from attnjax.data import images
from attnjax.models import pyramid
from attnjax.models.layout import named, path_of
from attnjax.training import sharding

B, SIDE, CHANNELS, CLASSES = 3, 8, 2, 5
# A stage of three layers; in front of each an MBConv, in front of the first one that
# halves the grid of 4 x 4.
SMALL = dict(
    embed_dim=8,
    num_heads=2,
    depths=(3,),
    patch_size=4,
    mlp_dim=0,
    stem="double",
    stem_dim=6,
    downsampling="mbconv",
    mbconv={"every": 1, "norm_eps": 0.1, "norm_momentum": 0.3},
    activation="gelu_tanh",
)
RECIPE = Path(__file__).parents[2] / "configs" / "pyramid" / "maxvit_t.py"


def make(**options):
    given = SMALL | options
    given = {name: value for name, value in given.items() if value is not ...}
    config = schema.build(pyramid.Config, pyramid.resolve(given))
    return pyramid.Pyramid(
        config, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES
    )


def start(model, dtype=np.float32):
    """Arrays from numpy, away from constant starts; variances are positive."""
    rng = np.random.default_rng(0)

    def one(leaf):
        return (0.5 * rng.normal(size=leaf.shape)).astype(dtype)

    params, buffers = jax.tree.map(one, jax.eval_shape(model.init, 0))
    return params, jax.tree.map(np.exp, buffers)


def images_of(batch=B):
    return np.random.default_rng(1).normal(size=(batch, SIDE, SIDE, CHANNELS))


@functools.cache
def trained():
    """A step of training: what goes in and comes out, float64."""
    with jax.enable_x64(True):
        model = make(
            dtype="float64", param_dtype="float64", remat="dots", kernel="reference"
        )
        params, buffers = start(model, np.float64)

        def loss(params, images):
            ctx = model.context(batch=B, train=True)
            logits, out = model.logits(params, buffers, images, ctx)
            return jnp.sum(jnp.square(logits)), (logits, out.buffers)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, (logits, after)), grads = run(params, images_of())
        return model, params, buffers, jax.device_get((logits, after, grads))


def by_parts(model, params, buffers, images):
    """Logits in training from the description, of parts that are tested alone."""

    def mbconv(x, in_dim, p, b, stride):
        told = dict(config=model.config.mbconv, stride=stride, dtype="float64")
        own = nnx.eval_shape(lambda: nn.MBConv(in_dim, 8, **told, rngs=nnx.Rngs(0)))
        graph, _, _ = nnx.split(own, nnx.Param, nn.Buffer)
        return nnx.merge(graph, p, b)(x, train=True)

    def convolved(x, p, stride):
        kernel = p["kernel"].reshape(3, 3, x.shape[-1], -1)
        order = ("NHWC", "HWIO", "NHWC")
        steps = (stride, stride)
        y = jax.lax.conv_general_dilated(
            x, kernel, steps, "SAME", dimension_numbers=order
        )
        return y + p["bias"]

    stem, ends = params["stem"], buffers["ends"]["downsampling"]
    x = convolved(images, stem["conv_0"], 2)
    x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 0.1)
    x = jax.nn.gelu(x * stem["norm_0"]["scale"] + stem["norm_0"]["bias"])
    x = convolved(x, stem["conv_1"], 1)
    x = mbconv(x, 6, params["downsampling"]["mbconv_0"], ends["mbconv_0"], 2)
    ctx = model.context(batch=len(x)).replace(train=True)
    graph = model.stages[0].stack._graphs["attention"]
    for group, i in (("group_0", 0), ("group_1", 0), ("group_1", 1)):
        both = (params["layers"][group]["sub_0"], buffers["layers"][group]["sub_0"])
        p, b = jax.tree.map(lambda a, i=i: a[i], both)
        if "mbconv" in p:
            x = mbconv(x, 8, p.pop("mbconv"), b["mbconv"], 1)
        tokens = x.reshape(len(x), 4, 8)
        x = nnx.merge(graph, p, {})(tokens, {}, ctx)[0].reshape(x.shape)
    pooled = x.mean((1, 2))
    pooled -= pooled.mean(-1, keepdims=True)
    pooled /= jnp.sqrt(jnp.square(pooled).mean(-1, keepdims=True) + 1e-6)
    pooled = pooled * params["final_norm"]["scale"] + params["final_norm"]["bias"]
    return pooled @ params["head"]["kernel"] + params["head"]["bias"]


def test_the_model_is_its_parts():
    model, params, buffers, (logits, _, _) = trained()
    assert model.layout.groups == ((("attention",), 1), (("attention+mbconv",), 2))
    assert "layers/002/mbconv/expand/kernel" in named(params["layers"], model.layout)
    with jax.enable_x64(True):
        wanted = jax.jit(functools.partial(by_parts, model))(
            params, buffers, images_of()
        )
    np.testing.assert_allclose(logits, wanted, rtol=1e-8, atol=1e-8)


def test_training_moves_every_norm_and_reaches_every_parameter():
    _, _, before, (_, after, grads) = trained()
    assert jax.tree.structure(before) == jax.tree.structure(after)
    still = jax.tree.map(lambda a, b: bool(np.any(a == b)), before, after)
    assert not any(jax.tree.leaves(still))
    # A norm of the batch takes away what all rows have alike, and a softmax what all
    # keys have.
    idle = {("norm_in", "bias"), ("conv_0", "bias"), ("key", "bias")}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        is_idle = path_of(path)[-2:] in idle
        assert (np.abs(grad).max() < 1e-9) == is_idle, path


def test_evaluation_names_an_image_alike_in_every_batch():
    """Running statistics stand, and rows do not see one another."""
    model = make(depths=(1,), mbconv={})
    params, buffers = start(model)

    @jax.jit
    def run(images):
        ctx = model.context(batch=len(images))
        logits, out = model.logits(params, buffers, images, ctx)
        return logits, out.buffers

    two = images_of(2).astype(np.float32)
    other = np.stack([two[0], two[1] + 1])
    (one, after), (again, _) = run(two), run(other)
    jax.tree.map(np.testing.assert_array_equal, after, buffers)
    np.testing.assert_allclose(one[0], again[0], rtol=1e-5)
    assert np.abs(one[1] - again[1]).max() > 1e-3


def test_drop_path_leaves_out_mbconvs_of_some_images():
    """Of equal images there are as many kinds as ways to keep branches: the MBConv
    between the stages, the second layer, and the MBConv and attention of the third.
    The first stage's MBConv and layer are always there."""
    model, plain = (make(depths=(1, 2), drop_path=rate) for rate in (0.6, 0.0))
    params, buffers = start(model)
    images = np.repeat(images_of(1).astype(np.float32), 256, axis=0)

    def logits(model, images, **told):
        ctx = model.context(batch=len(images), **told)
        return model.logits(params, buffers, images, ctx)[0]

    run = jax.jit(
        functools.partial(logits, model, train=True, prng_key=jax.random.key(0))
    )
    kinds = np.unique(np.asarray(run(images)).round(3), axis=0)
    assert len(kinds) == 2**4
    np.testing.assert_array_equal(
        *(jax.jit(functools.partial(logits, one))(images[:1]) for one in (model, plain))
    )


# ---- counting


def closed_form(c):
    """Parameters of a MaxViT at 1000 classes, of its block and its ends."""
    stem, dim = c["stem_dim"], c["embed_dim"]

    def block(before, width):
        wide, squeezed = 4 * width, width // 4
        conv = 2 * before + before * wide + 13 * wide
        conv += 2 * wide * squeezed + squeezed + wide + wide * width + width
        conv += (before * width + width) * (before != width)
        attention = 4 * width**2 + 4 * width + 169 * width // 32
        mlp = 8 * width**2 + 5 * width
        return conv + 2 * (attention + mlp + 4 * width)

    total, before = 27 * stem + 3 * stem + 9 * stem**2 + stem, stem
    for i, depth in enumerate(c["depths"]):
        width = dim * 2**i
        total += block(before, width) + (depth // 2 - 1) * block(width, width)
        before = width
    hidden = c["head_hidden"]
    return total + 2 * width + (width + 1) * hidden + 1000 * (hidden + 1)


@pytest.mark.parametrize(
    ("size", "millions"), [("T", 31), ("S", 69), ("B", 119), ("L", 212)]
)
def test_sizes_have_the_parameters_of_the_paper(size, millions):
    """torchvision's MaxViT-T has 30,919,624 at that: with 64 biases fewer in the stem
    and 1000 in the head, and a shortcut map of 64 x 64 in the first stage."""
    total = closed_form(load_file(f"{RECIPE}:{size}")["model"])
    assert round(total / 1e6) == millions
    if size == "T":
        assert total == 30_919_624 + 64 + 1000 - (64 * 64 + 64)


def test_the_recipe_has_the_parameters_of_the_closed_form():
    """All of it is resolved; two stages, of one block and of three, are counted."""
    given = load_file(str(RECIPE))
    source = images.config_class(given["data"]["name"])
    data = schema.build(source, schema.resolve(source, given["data"]))
    assert data.image_size == 224
    whole = pyramid.sized(schema.build(pyramid.Config, pyramid.resolve(given["model"])))
    assert (whole.widths, whole.stage_heads) == ((64, 128, 256, 512), (2, 4, 8, 16))
    cut = dict(given["model"]) | {"depths": (2, 6), "head_hidden": 128}
    config = schema.build(pyramid.Config, pyramid.resolve(cut))
    model = pyramid.Pyramid(config, image_size=56, channels=3, num_classes=1000)
    assert model.parameter_count() == closed_form(cut)
    assert [stage.grid for stage in model.stages] == [(14, 14), (7, 7)]


def test_flops_are_those_of_its_products():
    """Of images 8 x 8: the stem has 4 x 4 places, the stage 2 x 2."""
    model = make()
    stem = 16 * 9 * (CHANNELS * 6 + 6 * 6)

    def mbconv(before, places):
        products = places * before * 32 + 4 * (9 * 32 + 32 * 8) + 2 * 32 * 2
        return products + 4 * before * 8 * (before != 8)

    layers = model.stages[0].layer_flops(4)
    own = stem + mbconv(6, 16) + 2 * mbconv(8, 4) + 8 * CLASSES
    assert model.flops() == layers + 2 * own


# ---- devices


def test_wide_kernels_are_split():
    params, _ = jax.eval_shape(make().init, 0)
    whole = set()
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(key_path)
        axes = [a for a in sharding.logical_axes(path, leaf.ndim) if a != "layers"]
        if len(axes) > 1 and not any(axes):
            whole.add(path)
    assert not whole


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mbconv": {"squeeze": 0.0}},
            "config.model.mbconv: squeeze must be in (0, 1]",
        ),
        (
            {"mbconv": {"squeeze": 0.1}},
            "config.model.mbconv: squeeze must leave at least one channel",
        ),
        (
            {"downsampling": "patch", "stem": "patch", "mbconv": {"expansion": 3}},
            "config.model.mbconv: describes MBConvs, of which there are none",
        ),
        ({"patch_size": 1}, "patch_size: must be even for downsampling=mbconv"),
        (
            {"downsampling": "patch", "stem": "patch"},
            "stem_dim: the stem has the width of the first stage but with",
        ),
        (
            {"downsampling": "patch", "stem_dim": None},
            "patch_size: stem=double has a stride of 1 or 2; got patch_size=4",
        ),
        (
            {"positions": "anchored", "stem": "patch", "stem_dim": None}
            | {"downsampling": "patch"},
            "mbconv: convolutions have zeros around the image",
        ),
        ({"stem": "conv", "patch_size": 2}, "4, 8, ... with downsampling=mbconv); got"),
        ({"stem_dim": 0}, "config.model.stem_dim: must be at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(**options)


def test_only_pyramids_have_mbconvs():
    from attnjax.models import lm

    with pytest.raises(UserError, match="mbconv"):
        lm.resolve({"mbconv": {"every": 1}})
