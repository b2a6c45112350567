"""Attention of a layer whose rows lie on several devices.

Kernels are called inside `shard_map`, each device with its rows, heads and tokens:
compilers cannot split a Pallas kernel, and split the loops of `blocked` badly.
"""

import dataclasses
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding

from attnjax import kernels

HEADS, SEQUENCE = "tensor", "sequence"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: kernels.AttentionSpec,
    operands: Mapping[str, jax.Array],
    *,
    rows: NamedSharding | None,
    implementation: str,
    target: kernels.Target | None,
    form: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.attention`, on each device's own rows, heads and tokens.

    Args:
        query, key, value, spec, operands, implementation, target: as there.
        rows: how arrays [B, ...] lie on the devices (`Context.rows`); None on one.
        form: "ring" or "all_to_all" where they share tokens
            (`Context.sequence_form`), else None.
    """
    how = {"implementation": implementation, "target": target}
    if rows is None:
        return kernels.attention(query, key, value, spec, operands, **how)
    cuts = cuts_of(rows, query.shape[2], key.shape[2])
    if form is not None:
        cuts = dataclasses.replace(cuts, sequence=SEQUENCE)
    return kernels.sharded_attention(
        query,
        key,
        value,
        spec,
        operands,
        mesh=rows.mesh,
        cuts=cuts,
        form=form or "ring",
        **how,
    )


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    spec: kernels.LinearSpec,
    operands: Mapping[str, jax.Array],
    *,
    rows: NamedSharding | None,
    implementation: str = "auto",
    target: kernels.Target | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`kernels.linear_attention`, on each device's own rows, heads and tokens.

    Args:
        query, key, value, spec, operands, implementation, target: as there.
        rows: as in `attention`.
    """
    how = {"implementation": implementation, "target": target}
    if rows is None:
        return kernels.linear_attention(query, key, value, spec, operands, **how)
    cuts = cuts_of(rows, query.shape[2], key.shape[2])
    if len(rows.spec) > 1 and rows.spec[1] is not None:
        cuts = dataclasses.replace(cuts, sequence=SEQUENCE)
    return kernels.sharded_linear_attention(
        query, key, value, spec, operands, mesh=rows.mesh, cuts=cuts, **how
    )


def cuts_of(rows: NamedSharding, num_heads: int, num_kv_heads: int) -> kernels.Cuts:
    """Rows as in the batch; heads over `tensor` where it divides both H and K."""
    batch = rows.spec[0] if len(rows.spec) else None
    batch = (batch,) if isinstance(batch, str) else tuple(batch or ())
    parts = _size(rows.mesh, HEADS)
    divides = num_heads % parts == 0 and num_kv_heads % parts == 0
    return kernels.Cuts(batch=batch, heads=HEADS if divides else None, sequence=None)


def _size(mesh: Mesh, axis: str) -> int:
    return dict(mesh.shape).get(axis, 1)
