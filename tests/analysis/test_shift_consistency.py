"""How names of shifted images are compared."""

import types
from pathlib import Path

import numpy as np
import pytest

from attnjax.analysis import shift_consistency
from attnjax.core.errors import UserError
from attnjax.decoding.run import LoadedClassifier

SIDE = 8


def test_shifts_are_all_or_some_and_the_worst_are_those_nearby():
    steps, drawn, near = shift_consistency.shifts_of(5, "all", within=1)
    assert len(steps) == 24 and drawn.all() and steps.any(axis=1).all()
    nearby = {tuple((s + 2) % 5 - 2) for s in steps[near]}
    assert nearby == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)} - {(0, 0)}
    steps, drawn, near = shift_consistency.shifts_of(5, 3)
    assert len(steps) == 3 and drawn.all() and near.all()
    again, drawn, near = shift_consistency.shifts_of(5, 3, within=2)
    assert len(again) == 24 and drawn.sum() == 3 and near.all()
    np.testing.assert_array_equal(again[drawn], steps)


def test_names_are_compared_with_the_unshifted_and_with_the_class():
    """Three images in three shifts, of which the last is not near."""
    named = np.array([[0, 1, 2], [0, 1, 0], [0, 1, 2], [0, 0, 2]])
    labels, every = np.array([0, 1, 1]), np.ones(3, bool)
    near = np.array([True, True, False])
    found = shift_consistency.summary(named, labels, every, near)
    assert found["consistency"] == pytest.approx(7 / 9)
    assert found["unchanged"] == pytest.approx(1 / 3)
    assert found["worst_accuracy"] == pytest.approx(2 / 3)
    drawn = np.array([False, True, False])
    found = shift_consistency.summary(named, labels, drawn, every)
    assert (found["consistency"], found["unchanged"]) == (1.0, 1.0)
    assert found["worst_accuracy"] == pytest.approx(1 / 3)
    # A name that only shifts put right is wrong.
    put_right = np.array([[0], [1], [1]])
    two = np.ones(2, bool)
    found = shift_consistency.summary(put_right, np.array([1]), two, two)
    assert found["worst_accuracy"] == 0.0


class Corner:
    """Names an image by its pixel in the corner: 0 or 1, sure to its value."""

    image_size = SIDE

    def context(self, *, batch):
        """None is needed."""

    def logits(self, params, buffers, images, ctx):
        """[B, 2]."""
        del params, buffers, ctx
        corner = images[:, 0, 0]
        return np.float32([-1.0, 1.0]) * corner, None


def of_corner(monkeypatch, images, labels, *, weight):
    """A run that names by the corner, on images that are given."""
    batch = {"image": images, "label": labels, "weight": weight}
    beyond = batch | {"label": 1 - labels}  # More than an evaluation reads.
    feed = types.SimpleNamespace(eval_batches=lambda batch_size: iter([batch, beyond]))
    here = types.SimpleNamespace(
        model=Corner(),
        feed=feed,
        eval=types.SimpleNamespace(batch_size=4, batches=1),
    )
    monkeypatch.setattr(
        shift_consistency,
        "experiment",
        types.SimpleNamespace(build=lambda config: here),
    )
    config = {"model": {"name": "vit"}, "data": {"image_size": SIDE}}
    return LoadedClassifier(Path("run"), config, here.model, {}, {}, 0, ("off", "on"))


def test_a_run_is_measured_on_the_images_that_its_evaluation_reads(monkeypatch):
    """A bright row at the top: half of the shifts down by one lose it."""
    images = -np.ones((3, SIDE, SIDE, 1), np.float32)
    images[0, :4] = 1.0
    images[2, 3] = 7.0  # Padding, of weight 0.
    labels, weight = np.array([1, 0, 0]), np.array([1.0, 1.0, 0.0])
    run = of_corner(monkeypatch, images, labels, weight=weight)
    found = shift_consistency.measured(run, shifts="all", within=1)
    # Of 63 shifts 8 x 4 bring a dark row into the corner of the first image.
    assert found == {
        "shifts": 63,
        "consistency": pytest.approx((31 + 63) / 126),
        "unchanged": 0.5,
        "worst_accuracy": 0.5,
        "logit_change": 2.0,
    }
    found = shift_consistency.measured(run, shifts=5)
    assert found["shifts"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shifts": 64}, "--shifts: must be from 1 to 63, .* got shifts=64"),
        ({"shifts": 0}, "or all; got shifts=0"),
        ({"shifts": "all", "within": 8}, "--within: must be from 1 to 7 pixels"),
    ],
)
def test_shifts_that_there_are_not_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        shift_consistency.shifts_of(SIDE, **options)


def test_a_run_of_another_kind_is_refused():
    other = types.SimpleNamespace(path="run", config={"model": {"name": "lm"}})
    with pytest.raises(UserError, match="needs a classifier; got run, .*name=lm"):
        shift_consistency.check(other, shifts="all", within=None)
