"""Tables: validation, round trips, and what they refuse."""

import json

import pytest

from attnjax.core.errors import UserError
from attnjax.studies.table import (
    PaperValue,
    Table,
    more_is_better,
    show,
    text_of,
)

PAPER = PaperValue({"mixer": "gated"}, "eval/loss", 2.5, "Some Paper, Table 1")
POINTS = [
    {"mixer": mixer, "size": size, "seed": seed}
    for mixer in ("softmax", "gated")
    for size in (1, 2)
    for seed in (0, 1, 2)
]


def full() -> Table:
    return Table(
        rows=("mixer",),
        columns=("size",),
        metrics=("eval/loss", "eval/accuracy"),
        baseline={"mixer": "softmax"},
        paper=(PAPER,),
        title="Gates",
        caption="Small models.",
    )


def test_a_table_survives_json():
    table = full()
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_table_fits_its_points():
    full().check(POINTS)


def test_points_that_are_left_out_are_in_no_row():
    table = Table(rows=("mixer", "size"), leave_out={"role": "judge"})
    points = [*POINTS, {"role": "judge"}]
    table.check(points)
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    for wrong, near in ({"role": "juge"}, "judge"), ({"rolle": "judge"}, "mean role"):
        with pytest.raises(UserError, match=f"labels of a point.*{near}"):
            Table(rows=("mixer",), leave_out=wrong).check(points)
    rest = [one for one in points if "role" not in one]
    assert table.cut_to(rest, metrics=()).leave_out is None
    assert table.cut_to(points, metrics=table.metrics) == table
    with pytest.raises(UserError, match="leave points; got leave_out=role=judge"):
        table.check([{"role": "judge"}])


def test_defaults_are_the_held_out_loss_and_the_seed():
    table = Table(rows=("mixer",))
    assert table.metrics == ("eval/loss",)
    assert (table.seed, table.columns, table.baseline) == ("seed", (), None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rows": "mixer"}, r"rows must be a tuple of names; got rows='mixer'"),
        ({"rows": ("mixer", "mixer")}, "must not repeat"),
        ({"rows": (3,)}, "Table.rows: must be text; got 3"),
        ({"columns": ("mixer",)}, "different labels; got 'mixer' twice"),
        ({"metrics": ()}, "at least one metric"),
        ({"metrics": ("loss",)}, "got 'loss'. Write eval/loss or train/loss"),
        ({"metrics": ("eval/",)}, "got 'eval/'. Write eval/loss"),
        ({"best": 1}, "best must be True or False; got 1"),
        ({"baseline": {"mixr": "x"}}, "got 'mixr'. Did you mean mixer"),
        ({"baseline": {}}, "must map label names to values"),
        ({"baseline": {"mixer": object}}, "to text or numbers"),
        ({"uncompared": ("eval/los",)}, "got 'eval/los'. Did you mean eval/loss"),
        ({"leave_out": {}}, "Table.leave_out: must map label names"),
        ({"seed": ""}, "Table.seed: must be text"),
        ({"paper": ("2.5",)}, "must hold PaperValue objects"),
        (
            {"paper": (PaperValue({"mixer": "gated"}, "eval/los", 2.0, "s"),)},
            "got 'eval/los'. Did you mean eval/loss",
        ),
        (
            {"paper": (PaperValue({"size": 1}, "eval/loss", 2.0, "s"),)},
            "paper must name labels of rows or columns; got 'size'",
        ),
    ],
)
def test_a_bad_table_is_refused(fields, text):
    with pytest.raises(UserError, match=text):
        Table(**{"rows": ("mixer",), **fields})


@pytest.mark.parametrize("value", [True, "2", float("nan"), None])
def test_the_papers_value_is_a_finite_number(value):
    with pytest.raises(UserError, match="finite number; got value="):
        PaperValue({"mixer": "gated"}, "eval/loss", value, "s")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rows": ("mixr",)}, "rows must name labels .* Did you mean mixer"),
        ({"columns": ("sise",)}, "columns must name labels .* Did you mean size"),
        (
            {"baseline": {"mixer": "softmx"}},
            "baseline must be a row; got baseline=mixer=softmx. "
            "mixer: Did you mean softmax",
        ),
        (
            {"columns": ()},
            "must tell the points apart; .* Add 'size' to rows or columns",
        ),
        (
            {"paper": (PaperValue({"mixer": "gate"}, "eval/loss", 1.0, "s"),)},
            "paper's value must belong to a point; got eval/loss 1 "
            r"\(s\) of mixer=gate. mixer: Did you mean gated",
        ),
    ],
)
def test_a_table_that_does_not_fit_its_points_is_refused(fields, text):
    base = {"rows": ("mixer",), "columns": ("size",)}
    with pytest.raises(UserError, match=text):
        Table(**{**base, **fields}).check(POINTS)


def test_a_point_without_a_row_label_is_refused():
    with pytest.raises(UserError, match="a point without 'size': mixer=x, seed=0"):
        Table(rows=("mixer", "size")).check([*POINTS, {"mixer": "x", "seed": 0}])


def test_two_equal_points_are_refused():
    points = [{"mixer": "a", "seed": 0}] * 1 + [{"mixer": "a", "seed": 0}]
    with pytest.raises(UserError, match="Give them different labels"):
        Table(rows=("mixer",)).check(points)


def test_a_baseline_of_two_labels_must_be_one_point():
    table = Table(rows=("mixer", "size"), baseline={"mixer": "b", "size": 1})
    points = [{"mixer": "a", "size": 1}, {"mixer": "b", "size": 2}]
    with pytest.raises(UserError, match="No point has all of these together"):
        table.check(points)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "Table: must be a JSON object"),
        (
            {"rows": ["a"], "metric": ["x"]},
            "unknown key 'metric'. Did you mean metrics",
        ),
        ({"metrics": ["eval/loss"]}, "Table: rows is required"),
        ({"rows": ["a"], "paper": [{"labels": {}}]}, "PaperValue: metric is required"),
        ({"rows": ["a"], "paper": [3]}, "PaperValue: must be a JSON object; got 3"),
    ],
)
def test_broken_json_of_a_table_is_refused(value, text):
    with pytest.raises(UserError, match=text):
        Table.from_json(value)


def test_direction_is_known_by_name_or_declared():
    assert not more_is_better("eval/loss")
    assert more_is_better("eval/accuracy")
    assert more_is_better("eval/token_accuracy")
    assert more_is_better("samples/named") and not more_is_better("samples/frechet")
    assert not more_is_better("eval/accumulated")
    assert more_is_better("eval/depth", ("eval/depth",))


def test_values_read_as_on_the_command_line():
    values = (None, True, 2.0, 0.5, "x", ["a", 1])
    assert [text_of(v) for v in values] == ["none", "true", "2", "0.5", "x", "a 1"]


def test_a_papers_value_is_shown_with_its_source():
    assert show(PAPER) == "eval/loss 2.5 (Some Paper, Table 1) of mixer=gated"
