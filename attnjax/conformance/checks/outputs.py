"""Shapes, dtypes, lengths and precision of the full pass."""

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.conformance import samples
from attnjax.conformance.expect import (
    expect,
    expect_changed,
    expect_equal,
    expect_finite,
    wide,
)
from attnjax.conformance.subject import Subject, subject
from attnjax.core.context import MixerOut

LENGTHS = (1, 5)


def shapes_and_dtypes(s: Subject) -> None:
    """y is [B, T, C] in the compute dtype and finite, padding included."""
    x, ctx = samples.sample(s, "packed")
    y, out = s.forward(s.arrays, x, ctx)
    expect(y.shape == x.shape, f"y must have the shape of x; got {y.shape}, {x.shape}.")
    expect(
        y.dtype == jnp.dtype(s.dims.dtype),
        f"y must be in dims.dtype={s.dims.dtype}; got {y.dtype}.",
    )
    expect(isinstance(out, MixerOut), f"must return (y, MixerOut); got {type(out)}.")
    for name, loss in out.losses.items():
        expect(loss.shape == (), f"loss {name!r} must be a scalar; got {loss.shape}.")
        expect_finite(loss, f"loss {name!r} must be finite")
    expect_finite(y, "y must be finite")
    for path, leaf in jax.tree_util.tree_leaves_with_path(s.arrays[0]):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        expect(
            leaf.dtype == jnp.dtype(s.dims.param_dtype),
            f"parameter {where} must be stored in dims.param_dtype="
            f"{s.dims.param_dtype}; got {leaf.dtype}.",
        )


def mixes_tokens(s: Subject) -> None:
    """Some token reads another one: it is a token mixer."""
    x, ctx = samples.sample(s)
    before = s.y(x, ctx)
    after = s.y(*samples.perturb(x, ctx, samples.tokens(s.length, 0)))
    expect_changed(before[:, 0], after[:, 0], "y at token 0 must depend on token 0")
    expect_changed(before[:, 1:], after[:, 1:], "some later y must depend on token 0")


def batch_rows_are_independent(s: Subject) -> None:
    """Row 0 does not change with row 1."""
    x, ctx = samples.sample(s, "packed")
    where = np.zeros(x.shape[:2], bool)
    where[1] = True
    before, after = s.y(x, ctx), s.y(*samples.perturb(x, ctx, where))
    expect_equal(after[0], before[0], "row 0 must not depend on row 1", atol=1e-6)
    expect_changed(after[1], before[1], "row 1 must depend on itself")


def short_lengths(s: Subject) -> None:
    """T = 1 and 5 work, without segment ids too, and agree with the longer row."""
    x, ctx = samples.sample(s)
    for length in LENGTHS:
        bare = ctx.replace(segment_ids=None)
        part = samples.cut(x, bare, slice(0, length))
        y = s.y(*part)
        expect_finite(y, f"y of T={length} must be finite")
        longer = _beginning(s, x, ctx, length)
        if longer is not None:
            expect_equal(
                y,
                longer,
                f"the first {length} tokens alone, without segment_ids, must give "
                f"what they give in a row of {s.length}",
                atol=1e-5,
            )


def _beginning(s: Subject, x, ctx, length: int) -> np.ndarray | None:
    """What the first tokens give in a longer row that they cannot see."""
    if ctx.segment_ids is not None:
        ids = np.where(np.arange(s.length) < length, 1, 0) * ctx.segment_ids
        return s.y(x, ctx.replace(segment_ids=ids))[:, :length]
    return s.y(x, ctx)[:, :length] if s.causal else None


def bfloat16(s: Subject) -> None:
    """In bfloat16 y is bfloat16 and near the float32 one."""
    low = subject(s.module, s.options, {"dtype": "bfloat16"})
    x, ctx = samples.sample(s, "packed")
    x = x.astype(jnp.bfloat16)
    rounded = ctx.replace(
        embeddings=ctx.embeddings.astype(jnp.bfloat16),
        streams={k: v.astype(jnp.bfloat16) for k, v in ctx.streams.items()},
    )
    y, _ = low.forward(s.arrays, x, rounded)
    expect(y.dtype == jnp.bfloat16, f"y must be bfloat16; got {y.dtype}.")
    expect_finite(y, "y must be finite in bfloat16")
    full = s.y(x.astype(np.float32), ctx)
    gap = float(np.quantile(np.abs(wide(y) - full), 0.9) / max(full.std(), 1e-9))
    expect(
        gap <= s.settings.bf16_tolerance,
        "bfloat16 must be near float32 at nine entries of ten; got a difference of "
        f"{gap:.3g} standard deviations, allowed {s.settings.bf16_tolerance}.",
    )
