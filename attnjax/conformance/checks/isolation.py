"""Who sees whom: the future, padding, other documents, prefixes, memories, grids."""

import itertools

import jax
import numpy as np

from attnjax.conformance import samples
from attnjax.conformance.expect import (
    expect,
    expect_changed,
    expect_equal,
    expect_finite,
)
from attnjax.conformance.subject import Subject, subject


def causality(s: Subject) -> None:
    """Changing any one token changes no earlier output."""
    x, ctx = samples.sample(s)
    _expect_causal(s, x, ctx.replace(causal=True), first=1)


def _expect_causal(s: Subject, x, ctx, *, first: int) -> None:
    before = s.y(x, ctx)
    for j in range(first, x.shape[1]):
        after = s.y(*samples.perturb(x, ctx, samples.tokens(s.length, j)))
        expect_equal(
            after[:, :j],
            before[:, :j],
            f"outputs before token {j} must not depend on it",
            atol=1e-6,
        )


def any_order(s: Subject) -> None:
    """Tokens that lie in another order, and say so, give what they give in theirs."""
    x, ctx = samples.sample(s, "packed")
    order = np.random.default_rng(3).permutation(s.length)
    ids = ctx.segment_ids
    moved = ctx.replace(
        positions=ctx.positions[:, order],
        segment_ids=None if ids is None else ids[:, order],
        embeddings=ctx.embeddings[:, order],
        places=order[None].astype(np.int32),
        sequence_form="ring",
    )
    expect_equal(
        s.y(x[:, order], moved),
        s.y(x, ctx)[:, order],
        "outputs must not depend on the order in which tokens lie where ctx.places "
        "tells it (SPEC.capabilities.sequence)",
        atol=1e-5,
    )


def bidirectional(s: Subject) -> None:
    """With ctx.causal=False some output depends on a later token."""
    x, ctx = samples.sample(s, causal=False)
    before = s.y(x, ctx)
    last = samples.tokens(s.length, s.length - 1)
    after = s.y(*samples.perturb(x, ctx, last))
    expect_changed(
        after[:, :-1],
        before[:, :-1],
        "with ctx.causal=False some earlier output must depend on the last token",
    )
    first = samples.tokens(s.length, 0)
    after = s.y(*samples.perturb(x, ctx, first))
    expect_changed(
        after[:, 1:],
        before[:, 1:],
        "with ctx.causal=False some later output must depend on the first token",
    )
    if s.spec.capabilities.segments:
        _expect_isolated(s, causal=False)


def padding(s: Subject) -> None:
    """What stands in padding (segment id 0) changes no other output."""
    x, ctx = samples.sample(s, "packed")
    ids = ctx.segment_ids.copy()
    ids[0, 1] = 0  # inside a document too
    ctx, pad = ctx.replace(segment_ids=ids), ids == 0
    before = s.y(x, ctx)
    after = s.y(*samples.perturb(x, ctx, pad))
    expect_equal(
        after[~pad],
        before[~pad],
        "outputs of tokens must not depend on padding (segment id 0)",
        atol=1e-6,
    )
    nothing = ctx.replace(segment_ids=np.zeros_like(ctx.segment_ids))
    expect_finite(s.y(x, nothing), "y must be finite where all is padding")


def documents(s: Subject) -> None:
    """Packed documents do not see one another, and give what each gives alone."""
    _expect_isolated(s, causal=s.causal)


def _expect_isolated(s: Subject, *, causal: bool) -> None:
    x, ctx = samples.sample(s, "packed", causal=causal)
    before = s.y(x, ctx)
    ids = ctx.segment_ids
    for row in range(2):
        for one in sorted(set(ids[row]) - {0}):
            inside = np.zeros_like(ids, bool)
            inside[row] = ids[row] == one
            others = (ids != 0) & ~inside
            after = s.y(*samples.perturb(x, ctx, inside))
            expect_equal(
                after[others],
                before[others],
                f"outputs of other documents must not depend on document {one}",
                atol=1e-6,
            )
            alone = _alone(s, x, ctx, row, inside[row])
            expect_equal(
                alone,
                before[row][inside[row]],
                f"document {one} packed with others must give what it gives alone",
                atol=1e-5,
            )


def _alone(s: Subject, x, ctx, row: int, inside) -> np.ndarray:
    """The document moved to the front of a row of padding."""
    count = int(inside.sum())

    def move(a):
        moved = np.zeros_like(a)
        moved[row, :count] = a[row][inside]
        return moved

    moved = ctx.replace(
        segment_ids=move(ctx.segment_ids),
        positions=move(ctx.positions),
        embeddings=move(ctx.embeddings),
    )
    return s.y(move(x), moved)[row, :count]


def prefix(s: Subject) -> None:
    """Tokens before ctx.prefix_len see one another both ways; later ones do not."""
    length = 5
    x, ctx = samples.sample(s, causal=True)
    ctx = ctx.replace(prefix_len=np.full(2, length, np.int32))
    before = s.y(x, ctx)
    after = s.y(*samples.perturb(x, ctx, samples.tokens(s.length, length - 1)))
    expect_changed(
        after[:, : length - 1],
        before[:, : length - 1],
        "a token of the prefix must be seen by earlier ones",
    )
    _expect_causal(s, x, ctx, first=length)


def crossing(s: Subject) -> Subject:
    """The mechanism as cross-attention: with `cross=true` where it has the option."""
    if s.options.get("cross") is False:
        return subject(s.module, {**s.options, "cross": True})
    return s


def cross(s: Subject) -> None:
    """With ctx.memory outputs depend on it, and not on its padding."""
    s = crossing(s)
    x, ctx = samples.sample(s)
    ctx = samples.with_memory(s, ctx)
    before = s.y(x, ctx)
    expect(before.shape == x.shape, f"y must have the shape of x; got {before.shape}.")
    rng = np.random.default_rng(4)
    noise = (3 * rng.normal(size=ctx.memory.shape)).astype(ctx.memory.dtype)
    after = s.y(x, ctx.replace(memory=ctx.memory + noise))
    expect_changed(after, before, "outputs must depend on ctx.memory")
    if ctx.memory_segment_ids is not None:
        pad = (ctx.memory_segment_ids == 0)[..., None]
        after = s.y(x, ctx.replace(memory=ctx.memory + np.where(pad, noise, 0)))
        expect_equal(
            after, before, "outputs must not depend on padding of memory", atol=1e-6
        )
    other = np.zeros(ctx.memory.shape[:1] + (1, 1), bool)
    other[1] = True
    after = s.y(x, ctx.replace(memory=ctx.memory + np.where(other, noise, 0)))
    expect_equal(
        after[0], before[0], "row 0 must not depend on the memory of row 1", atol=1e-6
    )


def grids(s: Subject) -> None:
    """On grids of every declared rank tokens are mixed, and as the grid has them,
    behind extra tokens too where they are declared; a mixer without ranks ignores the
    grid and what stands before it."""
    if not s.spec.capabilities.grid:
        _expect_no_grid(s)
        return
    found = {}
    for rank in s.spec.capabilities.grid:
        grid = s.settings.grid or ()
        grid = grid if len(grid) == rank else _factors(s.length, rank)
        found[grid] = _expect_mixed(s, grid, 0)
        if s.spec.capabilities.extra_tokens:
            rest = {n: _factors(s.length - n, rank) for n in range(1, s.length)}
            fewest = next((n for n, sides in rest.items() if min(sides) > 1), 1)
            extra = s.settings.extra_tokens or fewest
            _expect_mixed(s, rest[extra], extra)
    for one, other in itertools.combinations(found, 2):
        expect_changed(
            found[one], found[other], f"y must differ on the grids {one} and {other}"
        )


def _expect_no_grid(s: Subject) -> None:
    x, ctx = samples.sample(s)
    plain = str(jax.make_jaxpr(s.call)(s.arrays, x, ctx))
    behind = {"grid": _factors(s.length - 1, 2), "extra_tokens": 1}
    for changes in ({"grid": _factors(s.length, 2)}, behind):
        with_grid = ctx.replace(**changes)
        expect(
            str(jax.make_jaxpr(s.call)(s.arrays, x, with_grid)) == plain,
            "declares no grid ranks, so ctx.grid and ctx.extra_tokens must change "
            "nothing.",
        )


def _expect_mixed(s: Subject, grid: tuple[int, ...], extra: int) -> np.ndarray:
    """y of a layer that is made for `grid` behind `extra` tokens."""
    made = subject(s.module, s.options, {"grid": grid, "prefix_tokens": extra})
    x, ctx = samples.sample(made, grid=grid, extra_tokens=extra)
    y = made.y(x, ctx)
    where = f"on the grid {grid} behind {extra} tokens"
    expect_finite(y, f"y {where}")
    for token in range(extra + 1):
        after = made.y(*samples.perturb(x, ctx, samples.tokens(s.length, token)))
        others = [t for t in range(s.length) if t != token]
        expect_changed(
            after[:, others],
            y[:, others],
            f"some other y {where} must depend on token {token}",
        )
    return y


def _factors(length: int, rank: int) -> tuple[int, ...]:
    """`rank` sides, smallest first and nearly equal, whose product is `length`."""
    if rank == 1:
        return (length,)
    largest = int(length ** (1 / rank) + 1e-9)
    side = next(n for n in range(largest, 0, -1) if length % n == 0)
    return (side, *_factors(length // side, rank - 1))
