from pathlib import Path

import pytest

from attnjax import studies
from attnjax.core.errors import UserError
from attnjax.studies import Point, concat, grid, point, seeds, zipped
from attnjax.studies.points import find_config

BASE = point("c.py", {"train.steps": 5}, study="a")


def test_a_grid_is_every_combination_and_the_last_key_moves_fastest():
    points = grid(BASE, {"optim.learning_rate": [1, 2], "model.layers": ["x", "y"]})
    assert [dict(one.labels) for one in points] == [
        {"study": "a", "learning_rate": rate, "layers": layers}
        for rate in (1, 2)
        for layers in ("x", "y")
    ]
    assert dict(points[3].overrides) == {
        "train.steps": 5,
        "optim.learning_rate": 2,
        "model.layers": "y",
    }


def test_zipped_values_move_together():
    points = zipped(BASE, {"model.embed_dim": [8, 16], "model.num_heads": [1, 2]})
    assert [(p.labels["embed_dim"], p.labels["num_heads"]) for p in points] == [
        (8, 1),
        (16, 2),
    ]


def test_values_and_keys_can_have_labels_of_their_own():
    values = {"model.layers": {"softmax": "attention", "both": ["x", "y"]}}
    points = grid(BASE, values, names={"model.layers": "mixer"})
    assert [p.labels["mixer"] for p in points] == ["softmax", "both"]
    assert [p.overrides["model.layers"] for p in points] == ["attention", ["x", "y"]]


def test_a_value_that_is_no_label_is_labelled_by_its_text():
    (one,) = grid(BASE, {"train.init_layers": [[0, 0, 1]]})
    assert one.labels["init_layers"] == "[0, 0, 1]"
    assert one.overrides["train.init_layers"] == [0, 0, 1]


def test_seeds_repeat_every_point():
    points = seeds(concat(BASE, point("d.py")), 2)
    assert [
        (p.config, p.labels["seed"], p.overrides["train.seed"]) for p in points
    ] == [
        ("c.py", 0, 0),
        ("c.py", 1, 1),
        ("d.py", 0, 0),
        ("d.py", 1, 1),
    ]
    assert [p.labels["seed"] for p in seeds(BASE, [7, 3])] == [7, 3]


def test_seeds_may_train_in_one_program():
    assert [p.vectorize for p in seeds(BASE, 2)] == [False, False]
    together = seeds(BASE, 2, vectorize="auto")
    assert [p.vectorize for p in grid(together, {"a.b": [1]})] == ["auto", "auto"]
    with pytest.raises(UserError, match=r"vectorize must be .*got vectorize='yes'"):
        seeds(BASE, 2, vectorize="yes")


def test_helpers_leave_their_points_as_they_were():
    grid(seeds(BASE, 2), {"train.steps": [1]})
    assert dict(BASE[0].overrides) == {"train.steps": 5}
    assert dict(BASE[0].labels) == {"study": "a"}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Point("c.py", {}, {"x": [1]}), r"labels must be texts.* got x=\[1\]"),
        (
            lambda: zipped(BASE, {"a": [1, 2], "b": [1]}),
            r"as many values of each key; got a: 2, b: 1",
        ),
        (lambda: grid(BASE, {"a.b": []}), r"'a\.b' has no values"),
        (lambda: grid(BASE, {"a.b": "xyz"}), r"values of 'a\.b' must be a list"),
        (lambda: grid(BASE, {"a.b": 3}), r"values of 'a\.b' must be a list"),
    ],
    ids=["label", "zip", "empty", "text", "number"],
)
def test_a_mistake_in_a_helper_is_named(make, text):
    with pytest.raises(UserError, match=text):
        make()


def test_a_config_is_found_beside_the_sweep_above_it_and_here(tmp_path, monkeypatch):
    sweep = tmp_path / "experiments" / "one" / "sweep.py"
    sweep.parent.mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.py").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert find_config("configs/c.py", sweep) == tmp_path / "configs" / "c.py"
    (elsewhere / "here.py").touch()
    assert find_config("here.py", sweep) == elsewhere / "here.py"
    (sweep.parent / "here.py").touch()
    assert find_config("here.py", sweep) == sweep.parent / "here.py"
    assert find_config(str(tmp_path / "configs" / "c.py"), sweep).is_file()
    assert find_config("none.py", sweep) is None
    assert find_config(str(tmp_path / "none.py"), sweep) is None


def test_no_module_of_the_room_hides_a_helper():
    """Importing attnjax.studies.NAME would put the module where the helper was."""
    room = Path(studies.__file__).parent
    modules = {path.stem for path in room.iterdir()}
    hidden = modules & set(studies.__all__)
    assert not hidden
