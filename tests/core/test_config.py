"""Config files and overrides, and how their mistakes are told."""

import pytest

from attnjax.core.config import apply_overrides, load_file, split_spec
from attnjax.core.errors import UserError
from attnjax.core.values import Text

CONFIG_DICT = """
import ml_collections
from ml_collections import config_dict
import numpy as np

def get_config(args="small"):
    config = ml_collections.ConfigDict()
    config.size = 3
    config.twice = config.get_ref("size") * 2
    config.args = args
    config.unset = config_dict.placeholder(int)
    config.rate = np.float32(0.5)
    config.optim = {"betas": (0.9, 0.95)}
    config.size = 5
    return config
"""


@pytest.fixture
def write(tmp_path):
    def make(text, name="quick.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return make


def refused(spec, match):
    with pytest.raises(UserError, match=match) as caught:
        load_file(spec)
    assert "\n" not in str(caught.value)


def test_a_config_dict_becomes_plain_json_with_references_followed(write):
    assert load_file(write(CONFIG_DICT)) == {
        "size": 5,
        "twice": 10,
        "args": "small",
        "unset": None,
        "rate": 0.5,
        "optim": {"betas": [0.9, 0.95]},
    }


def test_arguments_after_the_colon_reach_the_file(write):
    assert load_file(write(CONFIG_DICT) + ":size=9,x:y")["args"] == "size=9,x:y"


def test_a_plain_dict_is_a_config_too(write):
    path = write("def get_config():\n    return {'a': {'b': None}}\n")
    assert load_file(path) == {"a": {"b": None}}


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a/b.py", ("a/b.py", None)),
        ("a/b.py:", ("a/b.py", "")),
        ("a/b.py:x.py:y", ("a/b.py", "x.py:y")),
        ("config:x", ("config", "x")),
    ],
)
def test_spec_splits_at_the_first_colon_after_the_file(spec, parts):
    assert split_spec(spec) == parts


def test_a_missing_file_lists_the_nearest(write, tmp_path):
    write("", name="quickstart.py")
    refused(str(tmp_path / "quikstart.py"), r"Did you mean .*quickstart\.py\?$")
    refused(str(tmp_path / "zzz.py"), r"There are: quickstart\.py\.$")
    refused(str(tmp_path / "no" / "zzz.py"), "nor a folder")


def test_a_folder_is_not_a_config(tmp_path):
    refused(str(tmp_path), "cannot read .*: Is a directory")


def test_a_file_without_get_config_is_refused(write):
    refused(write("x = 1\n"), r"must define get_config\(\)")


def test_an_exception_in_the_file_is_one_line_with_its_place(write):
    path = write("import math\n\ndef get_config():\n    return math.sqrt(-1)\n")
    refused(path, r"quick\.py:4: ValueError: .*math domain error|expected a nonneg")
    refused(write("\nimport nothing_there\n"), r"quick\.py:2: ModuleNotFoundError")
    refused(write("raise SystemExit(3)\n"), r"quick\.py:1: SystemExit: 3")


def test_the_place_is_the_innermost_line_of_the_file_itself(write):
    path = write(
        "import json\n\ndef read():\n    return json.loads('{')\n\n"
        "def get_config():\n    return read()\n"
    )
    refused(path, r"quick\.py:4: JSONDecodeError: Expecting property name")


def test_a_syntax_error_is_one_line_with_its_place(write):
    refused(
        write("x = 1\ndef get_config(:\n"), r"quick\.py:2: SyntaxError: invalid syntax$"
    )


def test_arguments_for_a_file_that_takes_none_are_refused(write):
    path = write("def get_config():\n    return {}\n")
    refused(path + ":big", r"takes no arguments; got 'big'")


def test_a_file_that_needs_an_argument_says_how_to_give_it(write):
    path = write("def get_config(size):\n    return {}\n")
    refused(path, r"get_config\(size\) .* needs an argument\. .*quick\.py:SIZE$")


def test_what_json_cannot_hold_is_named(write):
    path = write("def get_config():\n    return {'a': {'b': [1, print]}}\n")
    refused(path, r"config\.a\.b\[1\]: must be a JSON value .* got builtin_function")
    refused(write("def get_config():\n    return {1: 2}\n"), "keys must be str")
    refused(write("def get_config():\n    return 3\n"), "must return .* got int")


def test_overrides_are_laid_over_a_copy_as_text():
    config = {"optim": {"rate": 1.0}, "rope": None}
    result = apply_overrides(
        config, [("optim.rate", "2"), ("rope.theta", "3"), ("new.key", "x")]
    )
    assert result == {
        "optim": {"rate": "2"},
        "rope": {"theta": "3"},
        "new": {"key": "x"},
    }
    assert isinstance(result["optim"]["rate"], Text)
    assert config == {"optim": {"rate": 1.0}, "rope": None}


def test_later_overrides_win():
    twice = [("rope", "none"), ("rope.theta", "3"), ("a", "1"), ("a", "2")]
    assert apply_overrides({}, twice) == {"rope": {"theta": "3"}, "a": "2"}


def test_an_override_through_a_value_is_refused():
    with pytest.raises(
        UserError, match=r"config\.optim\.rate: is a value, not a group"
    ):
        apply_overrides({"optim": {"rate": 1.0}}, [("optim.rate.x", "1")])
