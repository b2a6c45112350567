"""The options of a noising process, and which process they are of."""

import pytest

from attnjax.core import schema
from attnjax.core.errors import UserError
from attnjax.tasks.denoising import Config, Flow, Gaussian, make


def read(**given):
    return schema.build(Config, schema.resolve(Config, given))


def test_options_left_out_are_the_processes_defaults():
    assert make(read()) == Gaussian()
    assert make(read(process="flow")) == Flow()


def test_given_options_reach_the_process():
    made = make(
        read(steps=50, schedule="cosine", target="v", learn_sigma=True, vlb_weight=0.1)
    )
    assert made == Gaussian(50, "cosine", "v", True, 0.1)
    assert make(read(learn_sigma=False, variance="beta")).variance == "beta"
    made = make(
        read(
            process="flow",
            path="vp",
            target="score",
            weighting="likelihood",
            training_cut=1e-4,
            sampling_cut=2e-3,
        )
    )
    assert made == Flow("vp", "score", "likelihood", 1e-4, 2e-3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"process": "flow", "learn_sigma": False},
            "learn_sigma is of the other process; got process=flow. Its options are "
            "path, target",
        ),
        ({"path": "gvp", "weighting": "none"}, "path, weighting is of the other"),
        ({"target": "velocity"}, "target must be one of eps, v, x0; got 'velocity'"),
        ({"process": "flow", "target": "v"}, "target must be one of velocity"),
        ({"process": "edm"}, "gaussian"),
    ],
)
def test_options_of_the_other_process_are_refused(given, text):
    with pytest.raises(UserError, match=text):
        read(**given)


def test_an_unknown_process_is_refused_in_code_too():
    with pytest.raises(ValueError, match="process must be one of flow, gaussian; got"):
        Config(process="edm")
