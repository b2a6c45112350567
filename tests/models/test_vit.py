"""The vision transformer: what it computes, counts and refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.core import discovery, schema
from attnjax.core.errors import UserError
from attnjax.models import vit

B, SIDE, CHANNELS, CLASSES = 2, 6, 2, 5
SMALL = dict(embed_dim=16, num_heads=2, num_layers=2, patch_size=2, mlp_dim=24)


def make(*, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES, **options):
    config = schema.build(vit.Config, vit.resolve({**SMALL, **options}))
    return vit.ViT(
        config, image_size=image_size, channels=channels, num_classes=num_classes
    )


def start(model, seed=0):
    """Arrays from numpy, away from the constant starts of scales and biases."""
    rng = np.random.default_rng(seed)
    params, buffers = jax.eval_shape(model.init, 0)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

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
        {"positions": "none", "pool": "attentive", "pool_queries": 4},
    ],
    ids=["class token, learned", "mean, rope", "attentive, none"],
)
def test_the_model_is_its_description(options):
    model = make(**options)
    params, buffers = start(model)
    images = images_of()
    out = logits_of(model, params, buffers, images)
    wanted = [by_hand(model, params, np.float64(image)) for image in images]
    np.testing.assert_allclose(out, wanted, rtol=2e-4, atol=2e-4)


# ---- sizes


@pytest.mark.parametrize(
    ("size", "parameters", "gflops"),
    [
        ("Ti/16", 5_717_416, 2.507),
        ("S/16", 22_050_664, 9.198),
        ("B/16", 86_567_656, 35.128),
        ("L/16", 304_326_632, 123.109),
    ],
)
def test_sizes_have_the_published_parameters(size, parameters, gflops):
    """5.7M, 22.1M, 86.6M, 304.3M; FLOPs are twice the published multiply-adds."""
    config = schema.build(vit.Config, vit.resolve({"size": size}))
    model = vit.ViT(config, image_size=224, channels=3, num_classes=1000)
    assert model.parameter_count() == parameters
    assert model.flops() / 1e9 == pytest.approx(gflops, abs=5e-4)
    assert model.num_tokens == 197
    assert model.config.mlp_dim is None and model.block_dims.mlp_dim == (
        4 * model.config.embed_dim
    )


def test_a_size_gives_what_is_not_given_itself():
    filled = vit.resolve({"size": "S/4", "num_layers": 6, "patch_size": 2})
    assert filled["embed_dim"] is None
    config = vit.sized(schema.build(vit.Config, filled))
    assert (config.embed_dim, config.num_heads) == (384, 6)
    assert (config.num_layers, config.patch_size) == (6, 2)
    assert vit.resolve(filled) == filled
    other = vit.resolve(filled | {"size": "B/4"})
    assert vit.sized(schema.build(vit.Config, other)).embed_dim == 768


def test_counted_parameters_are_those_of_its_parts():
    """Every option that has parameters, by their closed form."""
    plain = make(positions="none", pool="mean").parameter_count()
    assert make(positions="none").parameter_count() - plain == 16
    assert make(pool="mean").parameter_count() - plain == 9 * 16
    assert make().parameter_count() - plain == 11 * 16
    more = dict(positions="none", pool="mean")
    assert make(**more, registers=3).parameter_count() - plain == 3 * 16
    assert make(**more, layer_scale=1e-4).parameter_count() - plain == 4 * 16
    attentive = make(positions="none", pool="attentive", pool_queries=4)
    assert attentive.parameter_count() - plain == 4 * 16 + 16 * 16


# ---- what a layer is told


def test_the_grid_that_mixers_see_is_that_of_the_patches():
    model = make(registers=2, positions="rope")
    ctx = model.context(batch=3)
    assert ctx.grid == model.grid == model.dims.grid == (3, 3)
    assert ctx.extra_tokens == model.dims.prefix_tokens == 3
    assert ctx.positions.shape == (3, model.num_tokens) == (3, 12)
    assert not ctx.causal and not ctx.train
    assert (model.dims.rope.grid, model.dims.rope.extra_tokens) == ((3, 3), 3)


def bidirectional():
    names = discovery.names()
    return [n for n in names if discovery.find(n).SPEC.capabilities.bidirectional]


def test_every_bidirectional_mixer_of_the_catalog_is_a_layer():
    """All of them in one model behind a register, traced in training."""
    names = bidirectional()
    assert len(names) >= 15
    sizes = dict(num_layers=len(names), positions="rope", registers=1)
    model = make(layers=tuple(names), pool="mean", **sizes)
    params, buffers = jax.eval_shape(model.init, 0)
    images = jax.ShapeDtypeStruct((B, SIDE, SIDE, CHANNELS), jnp.float32)

    def call(params, buffers, images, key):
        ctx = model.context(batch=B, prng_key=key, train=True)
        return model.logits(params, buffers, images, ctx)

    logits, out = jax.eval_shape(call, params, buffers, images, jax.random.key(0))
    assert logits.shape == (B, CLASSES)
    assert jax.tree.structure(out.buffers) == jax.tree.structure(buffers)


# ---- bad input


def test_a_mixer_that_is_only_causal_is_refused_when_the_config_is_read():
    with pytest.raises(UserError) as caught:
        make(layers="streaming_llm")
    assert str(caught.value) == (
        "config.model.mixers.streaming_llm: an image model is bidirectional, and "
        "streaming_llm is not. Choose another mixer for its layers."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "S16"}, "config.model.size: must be one of Ti, S, B, L, a slash"),
        ({"size": "H/14"}, "got 'H/14'. Example: S/16"),
        ({"patch_size": 0}, "config.model.patch_size: must be at least 1; got 0"),
        ({"registers": -1}, "config.model.registers: must be at least 0; got -1"),
        ({"drop_path": 1.0}, r"config.model.drop_path: must be in \[0, 1\); got 1"),
        ({"head_std": -1.0}, "config.model.head_std: must be at least 0"),
        (
            {"pool": "attentive", "pool_queries": 3},
            r"pool_queries=3, embed_dim=16. Use one of \[1, 2, 4, 8, 16\]",
        ),
        (
            {"positions": "sincos", "embed_dim": 18},
            "must be a multiple of 4, and at least 8, for positions=sincos; got 18",
        ),
        (
            {"positions": "rope", "positions_grid": 3},
            "resamples learned or sincos positions; got positions=rope. Leave it at "
            "none, and see config.model.rope.scaling",
        ),
        (
            {"positions": "rope", "num_heads": 8},
            "two axes turn four entries at least; got head_dim=2",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(
        UserError,
        match=r"must divide config.data.image_size; got patch_size=4, image_size=6. "
        r"Use one of \[1, 2, 3, 6\]",
    ):
        make(patch_size=4)


def test_images_of_another_size_or_number_of_channels_are_refused():
    model = make()
    params, buffers = start(model)
    for shape in ((B, 8, 8, CHANNELS), (B, SIDE, SIDE, 3), (SIDE, SIDE, CHANNELS)):
        with pytest.raises(UserError, match="image_size=6, channels=2") as caught:
            ctx = model.context(batch=B)
            model.logits(params, buffers, jnp.zeros(shape), ctx)
        assert "config.model.positions_grid=3" in str(caught.value)
