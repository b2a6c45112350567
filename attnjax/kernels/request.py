"""One call of attention as an implementation sees it before any arithmetic."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attnjax.kernels.operands import check_operands
from attnjax.kernels.spec import AttentionSpec
from attnjax.kernels.target import Target


@dataclasses.dataclass(frozen=True)
class Request:
    """Static facts of a call: what `supports` of an implementation decides on.

    Attributes:
        spec: the computation.
        target: the device it is for.
        batch, q_len, kv_len: B, T, S.
        num_heads, num_kv_heads: H and K; H is a multiple of K.
        head_dim, value_dim: D and E.
        dtypes: dtype names of q, k and v.
        operand_shapes: (name, shape) of each operand, sorted by name.
    """

    spec: AttentionSpec
    target: Target
    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtypes: tuple[str, str, str]
    operand_shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def operand_names(self) -> frozenset[str]:
        """Names of the operands that were given."""
        return frozenset(name for name, _ in self.operand_shapes)

    @property
    def static_positions(self) -> bool:
        """Whether positions are 0..T-1 and 0..S-1, known without running."""
        moved = {"q_offset", "q_positions", "k_positions"}
        return not moved & self.operand_names

    @property
    def scale(self) -> float:
        """The factor on q.k."""
        given = self.spec.scale
        return self.head_dim**-0.5 if given is None else given

    @property
    def core_dtype(self) -> jnp.dtype:
        """What an output is rounded to before the epilogue: q's dtype without one."""
        return self.compute_dtype if self.spec.epilogue else jnp.dtype(self.dtypes[0])

    @property
    def compute_dtype(self) -> jnp.dtype:
        """float64 when any of q, k and v is float64, else float32."""
        wide = "float64" in self.dtypes
        return jnp.dtype("float64" if wide else "float32")


def make_request(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttentionSpec,
    operands: Mapping[str, jax.Array],
    target: Target,
) -> Request:
    """Check shapes, dtypes and operands of a call (arrays or ShapeDtypeStructs).

    Raises:
        ValueError: for shapes that do not fit, or operands that do not match.
        TypeError: for a spec or dtype of the wrong kind.
    """
    if not isinstance(spec, AttentionSpec):
        raise TypeError(f"attention: spec must be an AttentionSpec; got spec={spec!r}.")
    _check_shapes(q, k, v)
    batch, q_len, num_heads, head_dim = q.shape
    _, kv_len, num_kv_heads, value_dim = v.shape
    sizes = {"b": batch, "h": num_heads, "t": q_len, "s": kv_len}
    sizes |= {"k": num_kv_heads, "e": value_dim}
    check_operands(operands, spec.operands, sizes)
    names = set(operands)
    _check_positions(spec, names, q_len, kv_len)
    return Request(
        spec=spec,
        target=target,
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtypes=tuple(jnp.dtype(x.dtype).name for x in (q, k, v)),
        operand_shapes=tuple(
            (name, tuple(operands[name].shape)) for name in sorted(names)
        ),
    )


def _check_shapes(q, k, v) -> None:
    shapes = f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise ValueError(
            "attention: q, k and v must be [B, T, H, D], [B, S, K, D] and "
            f"[B, S, K, E]; got {shapes}."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"attention: q, k and v must agree in B, k and v in S and K; got {shapes}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q and k must agree in D; got {shapes}.")
    if 0 in q.shape + k.shape + v.shape:
        raise ValueError(f"attention: no axis may be empty; got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention: query heads must be a multiple of key/value heads; got "
            f"H={q.shape[2]}, K={k.shape[2]}."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"attention: {name} must be floating point; got dtype={x.dtype}."
            )


def _check_positions(
    spec: AttentionSpec, names: set[str], q_len: int, kv_len: int
) -> None:
    if {"q_offset", "q_positions"} <= names:
        raise ValueError(
            "attention: q_offset and q_positions both say where queries are. Pass one."
        )
    placed = names & {"q_offset", "q_positions", "k_positions"}
    if not placed:
        spec.mask.check_lengths(q_len, kv_len)
    if spec.mask.positional and q_len != kv_len and not placed:
        raise ValueError(
            "attention: a mask by position needs to know where the queries are when "
            f"T != S; got T={q_len}, S={kv_len}. Pass operands={{'q_offset': ...}} "
            "(position of the first query) or q_positions and k_positions."
        )
