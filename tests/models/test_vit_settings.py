"""The vision transformer: sizes, counts, and settings that are refused."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from attnjax.core import schema
from attnjax.core.config import load_file
from attnjax.core.errors import UserError
from attnjax.data import images
from attnjax.models import vit

B, SIDE, CHANNELS, CLASSES = 2, 6, 2, 5
SMALL = dict(embed_dim=16, num_heads=2, num_layers=2, patch_size=2, mlp_dim=24)


def make(*, image_size=SIDE, channels=CHANNELS, num_classes=CLASSES, **options):
    config = schema.build(vit.Config, vit.resolve({**SMALL, **options}))
    return vit.ViT(
        config, image_size=image_size, channels=channels, num_classes=num_classes
    )


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


def test_the_imagenet_recipe_is_a_config():
    path = Path(__file__).parents[2] / "configs" / "vit" / "imagenet_s16.py"
    given = load_file(f"{path}:300")
    # 300 epochs of 99 % of 1,281,167 images.
    assert given["train"]["steps"] == 300 * (1_281_167 * 99 // 100) // 1024
    source = images.config_class(given["data"]["name"])
    data = schema.build(source, schema.resolve(source, given["data"]))
    config = schema.build(vit.Config, vit.resolve(given["model"]))
    model = vit.ViT(config, image_size=data.image_size, channels=3, num_classes=1000)
    # S/16 without class token and learned positions, with its hidden layer.
    extra = 384 * 384 + 384 - 384 - 197 * 384
    assert model.parameter_count() == 22_050_664 + extra


def test_a_size_gives_what_is_not_given_itself():
    filled = vit.resolve({"size": "S/4", "num_layers": 6, "patch_size": 2})
    assert filled["embed_dim"] is None
    config = vit.sized(schema.build(vit.Config, filled))
    assert (config.embed_dim, config.num_heads) == (384, 6)
    assert (config.num_layers, config.patch_size) == (6, 2)
    assert vit.resolve(filled) == filled
    listed = dict(size="S/4", layers=["attention"] * 5)
    config = vit.sized(schema.build(vit.Config, vit.resolve(listed)))
    assert (config.num_layers, len(config.layers)) == (None, 5)
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
    hidden = make(**more, head_hidden=7).parameter_count()
    assert hidden - plain == 17 * 7 + (7 + 1) * CLASSES - (16 + 1) * CLASSES
    wide = make(**more, head_hidden=7).flops() - make(**more).flops()
    assert wide == 2 * (16 * 7 + 7 * CLASSES - 16 * CLASSES)


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
        ({"head_hidden": 0}, "config.model.head_hidden: must be at least 1; got 0"),
        (
            {"class_token": False},
            "pool=class_token reads it; got class_token=false. Set it to none",
        ),
        ({"num_classes": 0}, "vit: num_classes must be at least 1; got num_classes=0"),
        (
            {"pool_queries": 4},
            "belongs to pool=attentive; got pool=class_token, pool_queries=4",
        ),
        (
            {"size": "S/2", "layers": "attention*5", "num_layers": None},
            "a schedule of 5 layers does not fill the 12 of size=S/2. Set "
            "config.model.num_layers to a multiple of 5",
        ),
        (
            {"positions": "none", "positions_grid": 3},
            "got positions=none. Leave it at none.$",
        ),
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
            "resamples added positions; got positions=rope. Leave it at "
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


def test_devices_that_share_tokens_are_refused():
    model = make()
    params, buffers = jax.eval_shape(model.init, 0)
    ctx = model.context(batch=B).replace(sequence_form="ring")
    with pytest.raises(UserError, match="config.mesh.sequence: an image model needs w"):
        model.hidden(params, buffers, jnp.zeros((B, SIDE, SIDE, CHANNELS)), ctx)


def test_images_of_another_size_or_number_of_channels_are_refused():
    model = make()
    params, buffers = model.init(0)
    for shape in ((B, 8, 8, CHANNELS), (B, SIDE, SIDE, 3), (SIDE, SIDE, CHANNELS)):
        with pytest.raises(UserError, match="image_size=6, channels=2") as caught:
            ctx = model.context(batch=B)
            model.logits(params, buffers, jnp.zeros(shape), ctx)
        assert "config.model.positions_grid=3" in str(caught.value)
