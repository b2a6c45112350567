import dataclasses

import pytest

from attnjax.core.errors import UserError
from attnjax.data import config_class, images, known_sources, open_corpus
from attnjax.data.config import TextConfig, check_fraction


def test_sources_are_the_files_that_declare_one():
    assert {"stdlib", "text", "tokens", "tfds"} <= set(known_sources())
    assert "batches" not in known_sources()


@pytest.mark.parametrize("name", ["stdlib", "text:*", "tokens:*", "tfds:x"])
def test_a_source_has_a_frozen_config_with_a_usable_default(name):
    config = config_class(name)
    assert issubclass(config, TextConfig)
    assert config.__dataclass_params__.frozen
    documented = config.__doc__ + TextConfig.__doc__
    for field in dataclasses.fields(config):
        assert f"{field.name}: " in documented


@pytest.mark.parametrize("name", ["stdlb", "batches", "", "no.such", "Stdlib:x"])
def test_an_unknown_source_is_refused(name):
    with pytest.raises(UserError, match=r"unknown source .*Known: .*stdlib"):
        config_class(name)


def test_the_nearest_source_is_named():
    with pytest.raises(UserError, match="Did you mean stdlib"):
        config_class("stdlb")


def test_a_superfluous_argument_is_refused():
    with pytest.raises(UserError, match="stdlib takes no argument; got name='stdlib:x"):
        config_class("stdlib:x")


def test_opening_an_unknown_source_is_refused():
    with pytest.raises(UserError, match="unknown source 'nowhere'"):
        open_corpus(TextConfig(name="nowhere"))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_a_share_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(UserError, match="eval_fraction must lie between 0 and 1"):
        check_fraction(fraction)


def test_an_empty_context_is_refused():
    with pytest.raises(UserError, match="seq_len must be at least 1; got seq_len=0"):
        TextConfig(seq_len=0)


def test_an_unknown_packing_is_refused():
    with pytest.raises(UserError, match="packing must be one of packed, windows"):
        TextConfig(packing="pakced")


def test_an_unknown_tokenizer_is_refused():
    config = config_class("stdlib")(tokenizer="byte")
    message = r"unknown tokenizer 'byte'\. Did you mean bytes"
    with pytest.raises(UserError, match=message):
        open_corpus(config)


@pytest.mark.parametrize("name", ["text", "text:", "tokens", "tfds:"])
def test_a_missing_argument_is_refused(name):
    with pytest.raises(UserError, match=f"needs an argument; got name='{name}'"):
        config_class(name)


def test_a_source_of_the_other_kind_is_said_to_be_one():
    message = r"unknown source 'digits'.* digits is a source of images, for vit and dit"
    with pytest.raises(UserError, match=message):
        config_class("digits")
    message = r"unknown source 'stdlib'.* stdlib is a source of text, for config\.model"
    with pytest.raises(UserError, match=message):
        images.config_class("stdlib")
