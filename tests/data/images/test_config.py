import dataclasses

import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.core.values import Text
from attnjax.data.images import (
    Augment,
    ImageConfig,
    config_class,
    known_sources,
    num_classes,
    open_corpus,
)

NAMES = ("digits", "glyphs", "tfds:x", "folder:x")


def test_sources_are_the_files_that_declare_one():
    pixels = {"digits", "glyphs", "tfds", "folder"}
    assert set(known_sources()) == {*pixels, "latents"}


@pytest.mark.parametrize("name", NAMES)
def test_a_source_has_a_frozen_config_whose_options_are_documented(name):
    cls = config_class(name)
    assert issubclass(cls, ImageConfig) and cls.__dataclass_params__.frozen
    docs = schema.field_docs(cls)
    assert {field.name for field in dataclasses.fields(cls)} == set(docs)
    inner = schema.field_docs(Augment)
    assert {field.name for field in dataclasses.fields(Augment)} == set(inner)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_goes_through_json(name):
    cls = config_class(name)
    given = {"name": name, "augment": {"mixup": Text("0.2"), "crop": Text("pad")}}
    resolved = schema.resolve(cls, given)
    built = schema.build(cls, resolved)
    assert built.augment == Augment(mixup=0.2, crop="pad")
    assert schema.to_json(built) == resolved


@pytest.mark.parametrize("name", ["digts", "batches", "threads", "", "no.such"])
def test_an_unknown_source_is_refused(name):
    with pytest.raises(UserError, match=r"unknown source .*Known: .*digits.*folder:PA"):
        config_class(name)


def test_an_argument_is_needed_or_not_taken():
    with pytest.raises(UserError, match=r"folder needs an argument.*Write folder:PATH"):
        config_class("folder")
    with pytest.raises(UserError, match="digits takes no argument"):
        open_corpus(ImageConfig(name="digits:3"))


def test_classes_are_counted_without_the_images(tmp_path):
    assert num_classes(config_class("glyphs")(chars="abc")) == 3
    for path in ("train/a/1.png", "train/b/2.png", "train/c/3.png", "val/a/1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(b"not decoded")
    assert num_classes(config_class("folder:x")(name=f"folder:{tmp_path}")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1; got image_size=0"),
        (
            {"channels": 2},
            r"channels must be 1 \(grey\) or 3 \(colour\); got channels=2",
        ),
        ({"mean": (0.1, 0.2)}, r"mean must have 1 or channels=1 entries; got mean=\(0"),
        ({"std": ()}, r"std must have 1 or channels=1 entries; got std=\(\)"),
        ({"std": (0.0,)}, r"std must be above 0; got std=\(0\.0,\)"),
        ({"eval_crop": 1.5}, r"eval_crop must be in \(0, 1\]; got eval_crop=1\.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ImageConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "inceptoin"}, "crop must be one of none, inception, pad; got crop='"),
        ({"min_area": 0.0}, r"min_area must be in \(0, 1\]; got min_area=0\.0"),
        ({"pad": -1}, "pad must be at least 0; got pad=-1"),
        ({"randaugment_layers": 9}, r"randaugment_layers must be in \[0, 8\]; got ran"),
        ({"randaugment_magnitude": 11.0}, r"magnitude must be in \[0, 10\]; got rand"),
        ({"mixup": -0.1}, r"mixup must be at least 0; got mixup=-0\.1"),
    ],
)
def test_augmentations_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Augment(**options)
