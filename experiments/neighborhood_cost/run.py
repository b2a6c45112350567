"""The cost of attention to 7 x 7 neighbourhoods as a plane grows, against full.

Command: python experiments/neighborhood_cost/run.py --out experiments/neighborhood_cost
A minute or two on two quiet cores. Writes table.md and cost.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import kernels
from attnjax.analysis import neighborhood_cost
from attnjax.benchmarks import machine, timing
from attnjax.kernels.choose_blocks import plan_blocks
from attnjax.kernels.request import make_request

SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128)
WINDOW, HEADS, HEAD_DIM = 7, 4, 32
TILE = (8, 8)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def program(spec, arrays):
    """n calls of one attention, compiled."""
    call = jax.jit(lambda q, k, v: kernels.attention(q, k, v, spec))

    def run(calls: int) -> None:
        for _ in range(calls):
            out = call(*arrays)
        jax.block_until_ready(out)

    return run


def specs(side: int) -> tuple[kernels.AttentionSpec, kernels.AttentionSpec]:
    """(neighbourhood, full) attention of a plane."""
    near = kernels.Neighborhood((side, side), WINDOW)
    return kernels.AttentionSpec(mask=near), kernels.AttentionSpec(mask=kernels.Full())


def arrays_of(side: int) -> list[jax.Array]:
    """Query, key and value of one image, float32."""
    rng = np.random.default_rng(0)
    shape = (1, side * side, HEADS, HEAD_DIM)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]


def measured(side: int, *, rounds: int) -> timing.Ratio:
    """Seconds of full attention over those of neighbourhood attention, forward."""
    names, arrays = ("near", "full"), arrays_of(side)
    pairs = zip(names, specs(side), strict=True)
    programs = {name: program(spec, arrays) for name, spec in pairs}
    calls = max(1, (32 // side) ** 3)
    found = timing.interleave(programs, rounds=rounds, calls=calls)
    return timing.ratio(found["full"].wall, found["near"].wall)


def counted(side: int) -> dict[str, float]:
    """Ideal speed-ups: by the tiles that our kernel visits, by square tiles of the
    plane, and by pairs of query and key alone."""
    spec, _ = specs(side)
    request = make_request(*arrays_of(side), spec, {}, kernels.Target("cpu"))
    plan = plan_blocks(request, None)
    rows = neighborhood_cost.row_major(
        spec.mask, block_q=plan.block_q, block_kv=plan.block_k
    )
    squares = neighborhood_cost.simulate(spec.mask, q_tile=TILE, kv_tile=TILE)
    return {
        "tile": f"{plan.block_q} x {plan.block_k}",
        "rows": rows.mean_speedup,
        "squares": squares.mean_speedup,
        "bound": squares.bound,
    }


def table(rows: list[dict]) -> str:
    """Markdown, a row a side."""
    lines = [
        "| grid | tokens | measured | tiles of our kernel | its tile "
        f"| tiles of {TILE[0]} x {TILE[1]} places | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row["measured"]
        lines.append(
            f"| {row['side']} x {row['side']} | {row['side'] ** 2:,} | "
            f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f}) | "
            f"{row['rows']:.2f} | {row['tile']} | {row['squares']:.2f} | "
            f"{row['bound']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """The speed-ups against the side of the plane."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), dpi=130)
    sides = [row["side"] for row in rows]
    for name, label, colour, style in (
        ("bound", "pairs: no tiling exceeds it", GREY, "--"),
        ("squares", f"tiles of {TILE[0]} x {TILE[1]} places", GREEN, ":"),
        ("rows", "tiles of our kernel", ORANGE, "-."),
    ):
        axes.plot(sides, [row[name] for row in rows], style, color=colour, label=label)
    middle = [row["measured"].median for row in rows]
    below = [row["measured"].median - row["measured"].low for row in rows]
    above = [row["measured"].high - row["measured"].median for row in rows]
    axes.errorbar(
        sides, middle, (below, above), fmt="o-", color=BLUE, label="measured, forward"
    )
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("side of the plane, tokens")
    axes.set_ylabel("times as fast as full attention")
    axes.set_title(f"attention to {WINDOW} x {WINDOW} neighbourhoods")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for side in SIDES:
        ratio = measured(side, rounds=options.rounds)
        rows.append({"side": side, "measured": ratio, **counted(side)})
        print(f"{side} x {side}: {ratio.median:.2f}", flush=True)
    about = machine.line(machine.describe())
    text = f"Times as fast as full attention. {about}.\n\n{table(rows)}"
    (options.out / "table.md").write_text(text)
    draw(rows, options.out / "cost.png")


if __name__ == "__main__":
    main()
