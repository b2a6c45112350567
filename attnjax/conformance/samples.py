"""Inputs of the checks: numpy arrays, so that changing an entry compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.conformance.subject import Subject
from attnjax.core.context import Context

MEMORY_LEN = 7


def segment_rows(layout: str, batch: int, length: int) -> np.ndarray:
    """Segment ids int32 [B, T].

    Args:
        layout: "whole" (one document a row); "packed" (row 0: documents 1 and 2,
            then padding; row 1: padding, then documents 3 and 4; row 7, where there
            is one: all padding; further rows alternate); "left" (row 0 whole, row 1
            with padding in front).
    """
    ids = np.ones((batch, length), np.int32)
    cut, end = 2 * length // 5, length - 2
    for row in range(batch):
        if layout == "packed" and row % 2 == 0:
            ids[row, cut:], ids[row, end:] = 2, 0
        elif layout == "packed":
            ids[row, :2], ids[row, 2:], ids[row, cut + 1 :] = 0, 3, 4
        elif layout == "left" and row % 2 == 1:
            ids[row, :3] = 0
    if layout == "packed" and batch > 7:
        ids[7] = 0
    return ids


def positions_of(ids: np.ndarray) -> np.ndarray:
    """The position of each token in its document, int32 [B, T]."""
    positions = np.zeros_like(ids)
    for t in range(1, ids.shape[1]):
        same = ids[:, t] == ids[:, t - 1]
        positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
    return positions


def sample(
    subject: Subject,
    layout: str | None = "whole",
    *,
    batch: int = 2,
    length: int | None = None,
    seed: int = 0,
    **changes,
) -> tuple[np.ndarray, Context]:
    """x [B, T, C] and a Context in the subject's compute dtype.

    Args:
        layout: of the segment ids, as in `segment_rows`; None leaves them out, as
            does a mechanism that does not know them.
        changes: further fields of the Context.
    """
    length = length or subject.length
    dtype = jnp.dtype(subject.dims.dtype)
    rng = np.random.default_rng(seed)
    shape = (batch, length, subject.dims.embed_dim)
    ids = segment_rows(layout or "whole", batch, length)
    known = layout is not None and subject.spec.capabilities.segments
    fields = dict(
        positions=positions_of(ids),
        segment_ids=ids if known else None,
        embeddings=rng.normal(size=shape).astype(dtype),
        streams=subject.streams(length),
        carried=subject.carried(batch, length),
        layer_index=np.int32(0),
        prng_key=jax.random.key(2),
        causal=subject.causal,
        grid=subject.grid,
    )
    return rng.normal(size=shape).astype(dtype), Context(**{**fields, **changes})


def with_memory(subject: Subject, ctx: Context, *, batch: int = 2) -> Context:
    """The same request with a memory of 7 tokens, the last of row 0 padding."""
    rng = np.random.default_rng(9)
    dtype = jnp.dtype(subject.dims.dtype)
    shape = (batch, MEMORY_LEN, subject.dims.embed_dim)
    ids = np.ones((batch, MEMORY_LEN), np.int32)
    ids[0, -1] = 0
    return ctx.replace(
        memory=rng.normal(size=shape).astype(dtype),
        memory_segment_ids=ids if subject.spec.capabilities.segments else None,
    )


def perturb(
    x: np.ndarray, ctx: Context, where: np.ndarray
) -> tuple[np.ndarray, Context]:
    """The same request with other tokens where `where` [B, T] is true."""
    rng = np.random.default_rng(1)
    mask = np.broadcast_to(where[..., None], x.shape)

    def change(a):
        other = (3 * rng.normal(size=a.shape)).astype(a.dtype)
        return np.where(mask, a + other, a)

    return change(x), ctx.replace(embeddings=change(ctx.embeddings))


def cut(x: np.ndarray, ctx: Context, part: slice) -> tuple[np.ndarray, Context]:
    """The tokens `part` of a request."""
    ids = ctx.segment_ids
    return x[:, part], ctx.replace(
        positions=ctx.positions[:, part],
        segment_ids=None if ids is None else ids[:, part],
        embeddings=ctx.embeddings[:, part],
        streams={name: s[:, part] for name, s in ctx.streams.items()},
        carried={name: s[:, part] for name, s in ctx.carried.items()},
    )


def tokens(length: int, *chosen: int, batch: int = 2) -> np.ndarray:
    """Bool [B, T], true at the chosen tokens of every row."""
    where = np.zeros((batch, length), bool)
    where[:, list(chosen)] = True
    return where
