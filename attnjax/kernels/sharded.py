"""Attention on arrays that are cut over a mesh: one `shard_map`, its cuts declared.

How an array is cut follows from the letters of its axes: b over the batch axes, h (and
the kv heads) over the head axis, t and s over the sequence axis. An axis of size 1 is
shared by all devices, and of an operand with t and s only t is cut.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attnjax.kernels import dispatch
from attnjax.kernels.all_to_all import all_to_all
from attnjax.kernels.errors import nearest
from attnjax.kernels.masks import And, MaskFn, Or
from attnjax.kernels.operands import letters_of
from attnjax.kernels.ring import ring
from attnjax.kernels.scores import ScoreFn
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target
from attnjax.kernels.tiles import declarations

Arrays = Mapping[str, jax.Array]
FORMS = {"ring": ring, "all_to_all": all_to_all}


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Which mesh axes cut what; an axis that the mesh lacks cuts nothing.

    Attributes:
        batch: mesh axes that share the batch.
        heads: mesh axis that shares heads (q's and kv's), or None.
        sequence: mesh axis that shares tokens, or None.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    heads: str | None = "tensor"
    sequence: str | None = "sequence"

    def on(self, mesh: Mesh) -> "Cuts":
        """The cuts that the mesh makes: axes that it has, with more than a device."""
        sizes = dict(mesh.shape)
        return Cuts(
            batch=tuple(name for name in self.batch if sizes.get(name, 1) > 1),
            heads=self.heads if sizes.get(self.heads, 1) > 1 else None,
            sequence=self.sequence if sizes.get(self.sequence, 1) > 1 else None,
        )

    def spec(self, letters: str, shape: tuple[int, ...]) -> P:
        """How an array with these axes is cut."""
        tokens = "t" if "t" in letters else "s"
        by = {"b": self.batch or None, "h": self.heads, "k": self.heads}
        by[tokens] = self.sequence
        if len(letters) != len(shape):
            return P()
        pairs = zip(letters, shape, strict=True)
        return P(*(by.get(x) if size > 1 else None for x, size in pairs))


DEFAULT = Cuts()


def sharded_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    operands: Arrays | None = None,
    *,
    mesh: Mesh,
    cuts: Cuts = DEFAULT,
    form: str = "ring",
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.attention` of whole arrays, each device computing its part.

    Args:
        q, k, v, spec, operands, implementation, target: as for `attention`. Tokens
            may lie in any order (see `zigzag`) when `q_positions` and `k_positions`
            say where they are.
        mesh: the devices.
        cuts: which mesh axes share what.
        form: "ring" or "all_to_all", where tokens are shared out.

    Raises:
        ValueError: for an unknown form, sizes that the mesh cannot share out, or a
            user function that reads the number of its row of the batch or its head
            where those are cut: give it an operand instead.
    """
    if form not in FORMS:
        raise ValueError(
            f"sharded_attention: unknown form {form!r}. {nearest(form, FORMS)}"
        )
    cuts = cuts.on(mesh)
    given = {name: jnp.asarray(x) for name, x in (operands or {}).items()}
    known = {name: letters_of(operand) for name, operand in declarations(spec).items()}
    _check_sizes(cuts, mesh, q.shape, k.shape)
    _check_functions(cuts, spec, form, given)
    specs = {
        name: P() if x.ndim == 0 else cuts.spec(known.get(name, ""), x.shape)
        for name, x in given.items()
    }
    place = P(cuts.batch or None, cuts.sequence, cuts.heads)
    run = functools.partial(
        _form(cuts, form), implementation=implementation, target=target
    )
    body = jax.shard_map(
        lambda q, k, v, operands: run(q, k, v, spec, operands),
        mesh=mesh,
        in_specs=(place, place, place, specs),
        out_specs=(place, place) if spec.return_lse else place,
    )
    # Compiled, because shard_map op by op cannot evaluate constants of masks.
    return jax.jit(body)(q, k, v, given)


def _form(cuts: Cuts, form: str) -> Callable:
    if cuts.sequence is None:
        return dispatch.attention
    return functools.partial(FORMS[form], axis_name=cuts.sequence)


def _check_sizes(cuts: Cuts, mesh: Mesh, q_shape, k_shape) -> None:
    sizes = dict(mesh.shape)
    batch = 1
    for name in cuts.batch:
        batch *= sizes[name]
    heads, tokens = sizes.get(cuts.heads, 1), sizes.get(cuts.sequence, 1)
    pairs = (("B", q_shape[0], batch), ("T", q_shape[1], tokens))
    pairs += (("S", k_shape[1], tokens), ("H", q_shape[2], heads))
    for name, size, parts in (*pairs, ("K", k_shape[2], heads)):
        if size % parts:
            raise ValueError(
                f"sharded_attention: {name} must be a multiple of the {parts} devices "
                f"that share it; got {name}={size}."
            )


def _check_functions(cuts: Cuts, spec: AttentionSpec, form: str, given: Arrays):
    """User functions see a device's own numbers of rows and heads."""
    cut = {"b": bool(cuts.batch), "h": bool(cuts.heads)}
    cut["h"] = cut["h"] or (cuts.sequence is not None and form == "all_to_all")
    for owner in _functions(spec):
        for letter in sorted(_indices_read(owner, given)):
            if cut.get(letter):
                raise ValueError(
                    f"sharded_attention: {type(owner).__name__} fn={owner.fn!r} reads "
                    f"{letter}, which counts from 0 on each device where that axis is "
                    "cut. Give it an operand with that axis instead."
                )


def _functions(spec: AttentionSpec) -> list[ScoreFn | MaskFn]:
    """Every user function of a spec."""
    found = [step for step in spec.score if isinstance(step, ScoreFn)]
    masks = [spec.mask]
    while masks:
        mask = masks.pop()
        if isinstance(mask, And | Or):
            masks += [mask.first, mask.second]
        elif isinstance(mask, MaskFn):
            found.append(mask)
    return found


def _indices_read(owner: ScoreFn | MaskFn, given: Arrays) -> set[str]:
    """Which of b, h, q and k the function's result depends on."""
    make = jax.ShapeDtypeStruct
    scores = [make((2,) * 4, jnp.float32)] if isinstance(owner, ScoreFn) else []
    operands = [
        make(x.shape if operand.axes == "*" else (2,) * 4, x.dtype)
        for operand in owner.operands
        for x in [given[operand.name]]
    ]
    index = [make((2,) * 4, jnp.int32)] * 4
    traced = jax.make_jaxpr(owner.fn)(*scores, *index, *operands).jaxpr
    read = [x for eqn in traced.eqns for x in eqn.invars] + list(traced.outvars)
    indices = traced.invars[len(scores) : len(scores) + 4]
    return {
        letter
        for letter, x in zip("bhqk", indices, strict=True)
        if any(x is other for other in read)
    }
