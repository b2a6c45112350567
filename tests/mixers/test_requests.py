"""What a mixer that reads a grid may be asked."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from attnjax.core.context import Context
from attnjax.core.errors import UserError
from attnjax.core.spec import Capabilities
from attnjax.mixers import attention
from attnjax.mixers.requests import check_request
from attnjax.models import mixer_choice

POSITIONS = jnp.zeros((1, 7), jnp.int32)


def spec_of(**capabilities):
    can = Capabilities(bidirectional=True, **capabilities)
    return dataclasses.replace(attention.SPEC, name="windows", capabilities=can)


def ask(spec, **fields):
    check_request(spec, Context(positions=POSITIONS, causal=False, **fields))


def test_tokens_before_a_grid_are_refused_where_it_must_come_alone():
    on_grid = spec_of(grid=(2,), needs_grid=True)
    ask(on_grid, grid=(2, 3))
    with pytest.raises(UserError) as caught:
        ask(on_grid, grid=(2, 3), extra_tokens=1)
    assert str(caught.value) == (
        "windows: takes exactly the tokens of a grid; got extra_tokens=1 (class token "
        "and registers) before it. Set config.model.pool=mean and "
        "config.model.registers=0."
    )
    ask(spec_of(grid=(2,), extra_tokens=True), grid=(2, 3), extra_tokens=1)
    ask(spec_of(), grid=(2, 3), extra_tokens=1)


def choice_of(**capabilities):
    module = types.SimpleNamespace(SPEC=spec_of(**capabilities))
    return {"a": mixer_choice.Choice("a", module, attention.Config())}


def test_a_model_on_a_grid_refuses_them_before_it_is_built():
    mixer_choice.check_on_grid(choice_of(grid=(2,)), 2, extra_tokens=0)
    mixer_choice.check_on_grid(choice_of(), 2, extra_tokens=5)
    with pytest.raises(UserError, match="got extra_tokens=5"):
        mixer_choice.check_on_grid(choice_of(grid=(1, 2)), 2, extra_tokens=5)
    with pytest.raises(
        UserError,
        match=r"config.model.mixers.a: windows takes grids of rank \(1, 3\)",
    ):
        mixer_choice.check_on_grid(choice_of(grid=(1, 3)), 2, extra_tokens=0)
