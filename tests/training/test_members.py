"""What runs of one program may differ in."""

import numpy as np
import pytest

from attnjax.core.errors import UserError
from attnjax.training import experiment, members


def config(**groups):
    return experiment.resolve({"data": {"name": "stdlib"}, **groups})


def seeded(seed, **optim):
    return config(train={"seed": seed}, optim=optim)


def test_seeds_and_numbers_of_the_optimizer_may_differ():
    group = [seeded(1), seeded(2, learning_rate=0.1, warmup_steps=7, clip_norm=2.0)]
    values = members.values(group)
    assert values.keys() == {"seed", "learning_rate", "warmup_steps", "clip_norm"}
    np.testing.assert_array_equal(values["seed"], [1, 2])
    np.testing.assert_allclose(values["learning_rate"], [1e-3, 0.1])
    assert values["warmup_steps"].dtype == np.int32


def test_what_is_equal_is_not_varied():
    assert members.values([seeded(1, beta1=0.8), seeded(2, beta1=0.8)]).keys() == {
        "seed"
    }


@pytest.mark.parametrize(
    "other",
    [
        {"model": {"num_layers": 3}},
        {"train": {"steps": 7}},
        {"optim": {"name": "lion"}},
        {"optim": {"schedule": "constant"}},
        {"mesh": {"fsdp": 2}},
        {"train": {"log_every": 3}},
        {"eval": {"every": 9}},
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(other):
    group, settings = next(iter(other.items()))
    name = f"config.{group}.{next(iter(settings))}"
    with pytest.raises(UserError, match=f"^vectorize: .*differ in {name}[ ,.]"):
        members.values([config(), config(**other)])


@pytest.mark.parametrize(
    "left, right",
    [
        (seeded(0, weight_decay=0.0), seeded(0, weight_decay=0.1)),
        (seeded(0, clip_norm=None), seeded(0)),
        (seeded(0, ema_decay=0.9), seeded(0)),
        (seeded(0, decay_steps=9), seeded(0)),
        (seeded(-1), seeded(0)),
        (seeded(2**31), seeded(0)),
    ],
)
def test_values_that_change_the_program_are_refused(left, right):
    with pytest.raises(UserError, match="one program cannot vary between these"):
        members.values([left, right])


def test_low_precision_parameters_keep_their_moments():
    model = {"param_dtype": "bfloat16"}
    free = config(model=model, optim={"learning_rate": 0.1})
    members.values([config(model=model), free])
    held = config(model=model, optim={"beta2": 0.9})
    with pytest.raises(UserError, match="beta2"):
        members.values([config(model=model), held])
