"""What masks show, what they claim about whole tiles, and what they refuse."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import kernels
from attnjax.kernels import Coverage, Span

SIZE = 13
MASKS = {
    "full": (kernels.Full(), lambda q, k: True),
    "causal": (kernels.Causal(), lambda q, k: k <= q),
    "window": (kernels.SlidingWindow(4), lambda q, k: q - 4 <= k <= q),
    "self": (kernels.SlidingWindow(0), lambda q, k: k == q),
    "two-sided": (kernels.SlidingWindow(2, 3), lambda q, k: q - 2 <= k <= q + 3),
    "ahead": (kernels.SlidingWindow(None, 2), lambda q, k: k <= q + 2),
    "unbounded": (kernels.SlidingWindow(None, None), lambda q, k: True),
    "sinks": (
        kernels.SlidingWindow(3, 0, sinks=2),
        lambda q, k: (q - 3 <= k or k < 2) and k <= q,
    ),
    "either": (
        kernels.SlidingWindow(1) | kernels.SlidingWindow(5, 5),
        lambda q, k: q - 5 <= k <= q + 5,
    ),
    "both": (
        kernels.Causal() & kernels.SlidingWindow(2, 2),
        lambda q, k: q - 2 <= k <= q,
    ),
}


def seen(mask):
    """[SIZE, SIZE] of what a mask without operands shows."""
    steps = jnp.arange(SIZE)
    tile = kernels.Tile(
        b=jnp.zeros((1, 1, 1, 1), jnp.int32),
        h=jnp.zeros((1, 1, 1, 1), jnp.int32),
        q=steps[None, None, :, None],
        k=steps[None, None, None, :],
        operands={},
    )
    visible = mask.visible(tile)
    visible = True if visible is None else visible
    return np.broadcast_to(visible, (1, 1, SIZE, SIZE))[0, 0]


@pytest.mark.parametrize("name", MASKS)
def test_mask_shows_what_its_definition_says(name):
    mask, rule = MASKS[name]
    wanted = [[rule(q, k) for k in range(SIZE)] for q in range(SIZE)]
    np.testing.assert_array_equal(seen(mask), wanted)


@pytest.mark.parametrize("name", MASKS)
def test_coverage_never_claims_what_is_not_so(name):
    mask, _ = MASKS[name]
    visible = seen(mask)
    cuts = list(itertools.combinations(range(SIZE + 1), 2))
    for (q0, q1), (k0, k1) in itertools.product(cuts[::2], cuts[::3]):
        part = visible[q0:q1, k0:k1]
        claim = mask.coverage(Span(q0, q1 - 1, k0, k1 - 1))
        assert claim != Coverage.EMPTY or not part.any()
        assert claim != Coverage.FULL or part.all()


@pytest.mark.parametrize("name", ["causal", "window", "two-sided", "sinks"])
def test_coverage_finds_every_tile_that_can_be_skipped(name):
    mask, _ = MASKS[name]
    assert mask.complete
    visible = seen(mask)
    for q, k in itertools.product(range(0, SIZE, 3), range(0, SIZE, 3)):
        part = visible[q : q + 3, k : k + 3]
        last = Span(q, min(q + 3, SIZE) - 1, k, min(k + 3, SIZE) - 1)
        assert (mask.coverage(last) == Coverage.EMPTY) == (not part.any())


def test_masks_are_static_and_hash_by_value():
    first = kernels.Causal() & kernels.SlidingWindow(3, sinks=1)
    again = kernels.Causal() & kernels.SlidingWindow(3, sinks=1)
    assert first == again
    assert hash(first) == hash(again)
    assert first != kernels.Causal() & kernels.SlidingWindow(4, sinks=1)


@pytest.mark.parametrize("bad", [{"left": -1}, {"left": 2.5}, {"left": 1, "sinks": -1}])
def test_window_refuses_what_is_not_a_count(bad):
    with pytest.raises(ValueError, match="must be an integer >= 0"):
        kernels.SlidingWindow(**bad)


def test_window_refuses_missing_sinks():
    with pytest.raises(ValueError, match="got sinks=None"):
        kernels.SlidingWindow(1, sinks=None)


def at_level(b, h, q, k):
    return q >= k


def not_boolean(b, h, q, k):
    return q - k


@dataclasses.dataclass(frozen=True)
class Holder:
    held: object

    def __call__(self, b, h, q, k):
        return q >= k


@dataclasses.dataclass
class Thawed:
    stride: int

    def __call__(self, b, h, q, k):
        return q >= k


@dataclasses.dataclass(frozen=True)
class Silent:
    stride: int


def test_function_masks_take_module_functions_and_frozen_dataclasses():
    assert kernels.MaskFn(at_level) == kernels.MaskFn(at_level)
    assert kernels.MaskFn(Holder(3)) == kernels.MaskFn(Holder(3))
    assert kernels.MaskFn(Holder(3)) != kernels.MaskFn(Holder(4))


def array_default(b, h, q, k, reach=jnp.ones(2)):  # noqa: B008 (what is refused)
    return q >= k


def test_functions_that_cannot_be_static_are_refused_with_the_rule():
    reach = jnp.ones(3)

    def local(b, h, q, k):
        return q >= k

    refused = {
        "which captures reach": lambda b, h, q, k: q - k < reach[0],
        "which is local": local,
        "array as a default argument": array_default,
        r"field held \(ArrayImpl\) cannot be hashed": Holder(reach),
        "which is not frozen": Thawed(2),
        "which has no __call__": Silent(2),
        "partial": functools.partial(at_level),
        "method": Holder(2).__call__,
    }
    for reason, fn in refused.items():
        for owner in (kernels.MaskFn, kernels.ScoreFn):
            with pytest.raises(ValueError, match="pass every array as an operand"):
                owner(fn)
            with pytest.raises(ValueError, match=reason):
                owner(fn)


def test_a_captured_tracer_is_refused_inside_jit():
    @jax.jit
    def step(scale):
        kernels.ScoreFn(lambda s, b, h, q, k: s * scale)

    with pytest.raises(ValueError, match="which captures scale"):
        step(2.0)


def test_function_mask_must_return_bool():
    q = jnp.ones((1, 4, 1, 8))
    spec = kernels.AttentionSpec(mask=kernels.MaskFn(not_boolean))
    with pytest.raises(TypeError, match="fn must return bool; got dtype=int32"):
        kernels.attention(q, q, q, spec)


def test_operand_layouts_are_checked():
    with pytest.raises(ValueError, match="one layout for each operand name"):
        kernels.MaskFn(at_level, ("reach",))
    with pytest.raises(ValueError, match="unknown operand layout 'rows'"):
        kernels.ScoreFn(at_level, ("reach",), ("rows",))


def test_one_operand_name_has_one_layout():
    first = kernels.MaskFn(at_level, ("reach",), ("head",))
    second = kernels.MaskFn(at_level, ("reach",), ("row",))
    with pytest.raises(ValueError, match="an operand name has one layout"):
        kernels.AttentionSpec(mask=first & second)
