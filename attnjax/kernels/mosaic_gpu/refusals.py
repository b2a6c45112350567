"""What the Hopper kernels cannot compute, and why."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from attnjax.kernels import tile_math, tiles
from attnjax.kernels.compat import NEWER_PRIMITIVES, inside_shard_map
from attnjax.kernels.masks import Tile
from attnjax.kernels.mosaic_gpu import by_blocks, distances, finish, thin
from attnjax.kernels.mosaic_gpu.inline import WRAPPERS
from attnjax.kernels.mosaic_gpu.tiles import MAX_DIM
from attnjax.kernels.request import Request
from attnjax.kernels.reweight import Reweight
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target
from attnjax.kernels.weight_maps import WeightMap

HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
# Fields of a spec that the kernels know; another one must keep its default.
FIELDS = {"mask", "scale", "score", "weight_map", "return_lse", "epilogue", "reweight"}
# What Mosaic GPU lowers, in lane semantics, on tiles in registers (jax 0.10); a test
# compares it with jax's own table.
_LOWERED = """
    abs add and bitcast_convert_type broadcast_in_dim clamp convert_element_type cos
    div eq erf exp exp2 ge gt integer_pow jit le log logistic lt max min mul ne neg
    not or pjit rem round rsqrt select_n sign sin square sub tanh xor
"""
PRIMITIVES = frozenset(_LOWERED.split()) | NEWER_PRIMITIVES
# What `inline` takes out of scores, weight maps and their derivatives.
INLINED = frozenset({*WRAPPERS, "add_any"})


def reason(request: Request) -> str | None:
    """Why the request cannot be computed, or None."""
    checks = (_device, _arrays, _fields, by_blocks.refusal, distances.refusal)
    checks += (finish.refusal, _operands, _functions, _epilogue)
    return next((found for check in checks if (found := check(request))), None)


def hopper_only(target: Target) -> str | None:
    """Why kernels for Hopper cannot be compiled for a target, or None."""
    if target.platform != "gpu":
        return f"needs platform gpu, not {target.platform}"
    if not HOPPER.search(target.device_kind.upper()):
        return (
            "is written for Hopper (sm_90a: H100, H200, H20, H800, GH200), not "
            f"{target.device_kind!r}"
        )
    return None


def _device(request: Request) -> str | None:
    target = request.target
    if target.num_devices > 1 and target.platform == "gpu" and not inside_shard_map():
        return (
            f"has to sit inside shard_map in a program for {target.num_devices} devices"
        )
    return hopper_only(target)


def _arrays(request: Request) -> str | None:
    if set(request.dtypes) not in ({"bfloat16"}, {"float16"}):
        return f"needs q, k and v all bfloat16 or all float16, not {request.dtypes}"
    if max(request.head_dim, request.value_dim) > MAX_DIM:
        dims = f"D={request.head_dim}, E={request.value_dim}"
        return f"needs D and E of at most {MAX_DIM}, not {dims}"
    return None


def _fields(request: Request) -> str | None:
    spec = request.spec
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name not in FIELDS and value != field.default:
            return f"does not compute {field.name}={value!r}"
    return None


def _operands(request: Request) -> str | None:
    known = {by_blocks.BLOCK_MASK, *distances.steps_of(request.spec)}
    for operand in request.spec.operands:
        if operand.axes == "*" and operand.name not in known:
            return (
                f"reads operands by tile; {operand.name!r} is a table that would be "
                "gathered from"
            )
    return None


def _functions(request: Request) -> str | None:
    read = tiles.of_tiles(request.spec, dict(request.operand_shapes))
    shapes = tuple(sorted(read.items()))
    return _lacking(distances.inside(request.spec), shapes)


@functools.lru_cache(maxsize=256)
def _lacking(spec: AttentionSpec, shapes) -> str | None:
    """The first operation of the spec's functions that Mosaic GPU does not lower."""
    parts = {
        "mask": lambda tile, s: by_blocks.seen(spec.mask, tile, lambda _: s > 0),
        "score": lambda tile, s: _with_gradient(spec, tile, s),
        "weight_map": lambda tile, s: _weighed(spec.weight_map, s),
        "reweight": lambda tile, s: _taken_again(spec.reweight, tile, s),
    }
    for name, part in parts.items():
        try:
            jaxpr = jax.make_jaxpr(lambda part=part: part(*_example(spec, shapes)))()
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            # A function that indexes the four axes [B, H, t, s] of its arguments.
            return (
                f"gives {name}={getattr(spec, name)!r} one head's tile [t, s], on "
                f"which it fails: {error}"
            )
        opened = frozenset() if name == "mask" else INLINED
        for primitive in _primitives(jaxpr.jaxpr):
            if primitive not in PRIMITIVES | opened:
                return (
                    f"cannot lower {primitive!r}, which {name}={getattr(spec, name)!r} "
                    "uses"
                )
    return None


@functools.lru_cache(maxsize=256)
def _epilogue(request: Request) -> str | None:
    """The first operation of the epilogue that the kernels do not lower."""
    steps = request.spec.epilogue
    if not steps:
        return None
    try:
        jaxpr = finish.example(request)
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"gives epilogue={steps!r} rows of one head [t, E]: {error}"
    for primitive in _primitives(jaxpr.jaxpr):
        if primitive not in PRIMITIVES | set(thin.REDUCTIONS):
            return f"cannot lower {primitive!r}, which epilogue={steps!r} uses"
    return None


def _example(spec: AttentionSpec, shapes):
    """A tile of two queries and keys, with every operand as a kernel would hold it."""
    known = tiles.declarations(spec)
    square, zero = jnp.zeros((2, 2), jnp.int32), jnp.int32(0)
    operands = {}
    for name, shape in shapes:
        operand = known[name]
        varies = any(
            letter in "ts" and size > 1
            for letter, size in zip(operand.axes, shape, strict=False)
        )
        kinds = {"int": jnp.int32, "bool": jnp.bool_}
        dtype = kinds.get(operand.kind, jnp.float32)
        operands[name] = jnp.zeros((2, 2) if varies else (), dtype)
    tile = Tile(b=zero, h=zero, q=square, k=square, operands=operands)
    return tile, jnp.zeros((2, 2), jnp.float32)


def _with_gradient(spec: AttentionSpec, tile: Tile, s: jax.Array):
    """The score steps and their derivatives, as `Hooks.score_pull` takes them."""
    if not spec.score:
        return s
    trained = {
        x.name: jnp.broadcast_to(tile.operands[x.name], s.shape)
        for x in spec.score_operands
    }
    chain = tiles.score_chain(spec, tile)
    ones = (jnp.ones_like(s), jax.tree.map(jnp.ones_like, trained))
    return chain(s, trained), jax.jvp(chain, (s, trained), ones)


def _weighed(weight_map: WeightMap, s: jax.Array):
    shift = s if weight_map.exponential else None
    u, summed = tile_math.weigh(weight_map, s, shift, s > 0)
    ct = (s, s if weight_map.needs_sum else None)
    ds = tile_math.score_cotangent(weight_map, s, u, shift, s > 0, ct)
    return u, summed, ds


def _taken_again(reweight: Reweight | None, tile: Tile, s: jax.Array):
    if reweight is None:
        return s
    place = dict.fromkeys(("b", "h", "q", "k"))
    operands = {x.name: tile.operands[x.name] for x in reweight.operands}
    tile, peak = Tile(**place, operands=operands), jnp.zeros((2, 1), s.dtype)
    fns = (reweight.apply, reweight.slope)
    return [fn(s, peak, tile) for fn in fns], reweight.extra(peak, tile)


def _primitives(jaxpr):
    """Names of the operations of a jaxpr on arrays, inner ones included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)
