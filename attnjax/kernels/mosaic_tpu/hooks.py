"""Whether a TPU kernel can trace a spec's own functions: masks, score steps, maps."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from attnjax.kernels import look_ups, tiles
from attnjax.kernels.compat import NEWER_PRIMITIVES
from attnjax.kernels.masks import Tile
from attnjax.kernels.operands import as_rank4
from attnjax.kernels.request import Request
from attnjax.kernels.scores import ScoreStep
from attnjax.kernels.spec import AttentionSpec

# Elementwise primitives, and moves between shapes, that Mosaic lowers for vectors.
_WORDS = """
    abs add add_any and atan2 broadcast_in_dim ceil clamp clz concatenate
    convert_element_type copy copy_p cos custom_jvp_call custom_vjp_call div eq erf
    erf_inv exp exp2 floor ge gt integer_pow iota is_finite jit le log log1p
    logistic lt max min mul ne neg nextafter not or pcast pjit population_count pow
    rem reshape round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin slice split sqrt square squeeze stop_gradient sub
    tan tanh transpose xor
"""
LOWERED = frozenset(_WORDS.split()) | NEWER_PRIMITIVES
_DTYPES = {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}
# What an operand of "any" kind may be: a request does not say.
_ANY = (jnp.int32, jnp.float32, jnp.bool_)
_SHAPE = (1, 1, 8, 128)
# Rows of a register. Fewer queries would leave tiles empty, and every query head would
# read the keys by itself: such a step of decoding has a kernel of its own.
MIN_QUERIES = 8


@functools.lru_cache(maxsize=256)
def mask_problem(request: Request) -> str | None:
    """Why the mask cannot be evaluated inside a kernel, or None."""
    mask = _spec(request).mask
    names = {operand.name for operand in mask.operands}
    return _problem(request, names, mask.visible, type(mask).__name__)


@functools.lru_cache(maxsize=256)
def score_problem(request: Request) -> str | None:
    """Why a score step cannot be computed inside a kernel, or None."""
    for step in _spec(request).score:
        names = {operand.name for operand in step.operands}
        name = type(step).__name__
        found = _problem(request, names, functools.partial(_both_ways, step), name)
        if found:
            return found
    return None


@functools.lru_cache(maxsize=256)
def map_problem(request: Request) -> str | None:
    """Why the weight map cannot be computed inside a kernel, or None."""
    weight_map = request.spec.weight_map

    def formulas(s):
        shift = s[..., :1] if weight_map.exponential else None
        u = weight_map.unnormalized(s, shift)
        if weight_map.split:
            return u, weight_map.summed(s, shift), weight_map.slopes(s, shift)
        return u, weight_map.slope(s, u)

    traced = jax.make_jaxpr(formulas)(jax.ShapeDtypeStruct(_SHAPE, jnp.float32))
    return _missing(traced.jaxpr, type(weight_map).__name__)


@functools.lru_cache(maxsize=256)
def reweight_problem(request: Request) -> str | None:
    """Why the second pass over rows cannot be computed inside a kernel, or None."""
    again = request.spec.reweight
    if again is None:
        return None
    names = {operand.name for operand in again.operands}

    def formulas(tile: Tile):
        p = jnp.zeros(_SHAPE, jnp.float32)
        peak = p[..., :1]
        found = again.apply(p, peak, tile), again.slope(p, peak, tile)
        return (*found, again.extra(peak, tile))

    return _problem(request, names, formulas, type(again).__name__)


def _spec(request: Request) -> AttentionSpec:
    """The spec whose functions a kernel traces; that of decoding makes no tables."""
    if request.q_len < MIN_QUERIES:
        return request.spec
    return look_ups.inside(request.spec)


def _both_ways(step: ScoreStep, tile: Tile):
    """A step and its derivative."""
    fixed = {n: x for n, x in tile.operands.items() if x.dtype != jnp.float32}
    # Spread, as `tiles.trained_tiles` does, so that no derivative is a sum.
    trained = {
        name: jnp.broadcast_to(x, _SHAPE)
        for name, x in tile.operands.items()
        if name not in fixed
    }

    def apply(s, trained):
        return step.apply(s, dataclasses.replace(tile, operands=fixed | trained))

    scores = jnp.zeros(_SHAPE, jnp.float32)
    return jax.vjp(apply, scores, trained)[1](scores)


def _problem(request: Request, names: set[str], function: Callable, owner: str):
    known = tiles.declarations(_spec(request))
    for name in sorted(names):
        if known[name].axes == "*":
            return f"cannot look values up in a table, as operand {name!r} is"

    def trace(operands):
        arrays = {name: as_rank4(x, known[name].axes) for name, x in operands.items()}
        return function(_tile(arrays))

    for any_dtype in _ANY:
        dtypes = _DTYPES | {"any": any_dtype}
        shapes = _shapes(request, {n: dtypes[known[n].kind] for n in names})
        try:
            traced = jax.make_jaxpr(trace)(shapes)
        except TypeError:
            # Not a dtype for this function; if none is, the kernel will say why.
            continue
        return _missing(traced.jaxpr, owner)
    return None


def _missing(jaxpr, owner: str) -> str | None:
    missing = " and no ".join(sorted(set(_primitives(jaxpr)) - LOWERED))
    return f"has no {missing} in a kernel, which {owner} takes" if missing else None


def _shapes(request: Request, dtypes) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the operands of one small tile."""
    known = tiles.declarations(_spec(request))
    outside = tiles.declarations(request.spec)
    sizes = dict(zip("bhts", _SHAPE, strict=True))
    # A table is a whole tile inside a kernel.
    given = {
        name: shape
        for name, shape in request.operand_shapes
        if outside[name].axes != "*"
    }
    given = dict.fromkeys(dtypes, _SHAPE) | given
    return {
        name: jax.ShapeDtypeStruct(
            tuple(
                1 if size == 1 else sizes[letter]
                for size, letter in zip(given[name], known[name].axes, strict=True)
            ),
            dtype,
        )
        for name, dtype in dtypes.items()
    }


def _tile(operands) -> Tile:
    index = [
        jnp.arange(n, dtype=jnp.int32).reshape(
            [n if a == axis else 1 for a in range(4)]
        )
        for axis, n in enumerate(_SHAPE)
    ]
    return Tile(*index, operands=operands)


def _primitives(jaxpr) -> Iterator[str]:
    """Names of all primitives of a jaxpr, those of inner ones too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from _primitives(inner)
