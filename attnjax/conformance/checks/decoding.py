"""Decoding in any cuts against the full pass, and the state that it carries."""

import jax
import numpy as np

from attnjax.conformance import samples
from attnjax.conformance.checks.isolation import crossing
from attnjax.conformance.expect import (
    difference,
    expect,
    expect_equal,
    expect_finite,
)
from attnjax.conformance.subject import Subject, nested, subject
from attnjax.core import schema

ATOL = 2e-5
SMALL = 4


def exact(s: Subject) -> Subject:
    """The subject under the options for which decoding is declared exact."""
    options = dict(s.spec.decode.options)
    if not options:
        return s
    return subject(s.module, schema.merge(s.options, nested(options)))


def cuts_of(length: int) -> list[tuple[int, ...]]:
    """Ways to cut a sequence: whole, token by token, and chunks in random order."""
    cuts = [(length,), (1,) * length]
    rng = np.random.default_rng(12)
    parts = [SMALL] * (length // SMALL) + [1] * (length % SMALL)
    return cuts + [tuple(int(n) for n in rng.permutation(parts)) for _ in range(3)]


def decode(s: Subject, x, ctx, sizes, *, max_len: int) -> np.ndarray:
    """Outputs [B, T, C] of `step` over consecutive pieces of the given sizes."""
    state = s.init_state(x.shape[0], max_len, ctx.memory)
    pieces, at = [], 0
    for size in sizes:
        form = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        y, state = s.step(s.arrays, *_piece(x, ctx, at, size, state))
        expect(
            jax.tree.map(lambda a: (a.shape, a.dtype), state) == form,
            f"step must keep the shapes and dtypes of the state; a step of {size} "
            f"tokens turned {form} into "
            f"{jax.tree.map(lambda a: (a.shape, a.dtype), state)}.",
        )
        expect(
            y.shape == (x.shape[0], size, x.shape[2]),
            f"step of {size} tokens must return them; got {y.shape}.",
        )
        pieces.append(np.asarray(jax.device_get(y)).astype(np.float64))
        at += size
    return np.concatenate(pieces, axis=1)


def _piece(x, ctx, at: int, size: int, state) -> tuple:
    part, here = samples.cut(x, ctx, slice(at, at + size))
    return part, state, here


def any_cuts(s: Subject) -> None:
    """Prefill, chunks and single tokens give what the full pass gives."""
    s = exact(s)
    x, ctx = samples.sample(s, "left", causal=True)
    # Subjects outlive jax's caches where many run in one process.
    before = s.traces.copy()
    expect_exact(s, x, ctx, cuts_of(s.length))
    traces = s.traces - before
    most = max((n for (what, *_), n in traces.items() if what == "step"), default=0)
    expect(
        most <= 1,
        f"step must be traced once for each number of tokens; got {most} traces: the "
        "state of init_state and of step differ (a weak type, a Python number).",
    )


def packed_documents(s: Subject) -> None:
    """A state in which a document ends and another begins starts afresh."""
    s = exact(s)
    x, ctx = samples.sample(s, "packed", causal=True)
    expect_exact(s, x, ctx, [(s.length,), *cuts_of(s.length)[2:]])


def without_segments(s: Subject) -> None:
    """Prefill and single tokens without segment ids are one document."""
    s = exact(s)
    x, ctx = samples.sample(s, causal=True)
    full = s.y(x, ctx)
    bare = ctx.replace(segment_ids=None)
    y = decode(s, x, bare, (1,) * s.length, max_len=s.length)
    expect_equal(y, full, "decoding without segment_ids must be exact", atol=ATOL)


def with_memory(s: Subject) -> None:
    """Cross-attention decodes from the memory given to init_state."""
    s = crossing(exact(s))
    x, ctx = samples.sample(s)
    expect_exact(s, x, samples.with_memory(s, ctx), [(1,) * s.length])


def with_prefix(s: Subject) -> None:
    """A prefix that lies within one step decodes as in the full pass."""
    s = exact(s)
    x, ctx = samples.sample(s, causal=True)
    ctx = ctx.replace(prefix_len=np.full(2, 5, np.int32))
    expect_exact(s, x, ctx, [(s.length,)])


def expect_exact(s: Subject, x, ctx, cuts) -> None:
    """Decoding in each of `cuts` equals the full pass at every token."""
    full = s.y(x, ctx)
    valid = np.ones(x.shape[:2], bool)
    if ctx.segment_ids is not None:
        valid = ctx.segment_ids != 0
    for sizes in cuts:
        y = decode(s, x, ctx, sizes, max_len=s.length + 3)
        expect_finite(y, f"decoding in pieces of {sizes} must be finite")
        expect_equal(
            y[valid],
            full[valid],
            f"decoding in pieces of {sizes} must equal the full pass",
            atol=ATOL,
        )


def declared_difference(s: Subject) -> None:
    """A declared difference exists, and has a reason."""
    told = s.spec.decode
    expect(bool(told.reason), "SPEC.decode must give the reason why decoding differs.")
    x, ctx = samples.sample(s, causal=True)
    full = s.y(x, ctx)
    y = decode(s, x, ctx, (1,) * s.length, max_len=s.length + 3)
    expect_finite(y, "decoding must be finite")
    expect(
        difference(y, full) > 10 * ATOL,
        "SPEC.decode declares a difference that the settings of this test do not "
        "show. Declare it exact, or choose CONFORMANCE options that show it.",
    )


def state_size(s: Subject) -> None:
    """init_state has the elements that SPEC.state_size says."""
    for max_len in (s.length + 3, 4 * s.length):
        state = jax.eval_shape(lambda n=max_len: s.new_state(s.build(), 1, n))
        have = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
        told = s.spec.state_size(s.config, s.dims, max_len)
        expect(
            have == told,
            f"SPEC.state_size must count the state of one sequence; got {told}, the "
            f"state of max_len={max_len} has {have} elements.",
        )
