"""How strongly, and which heads to perturb: a strength grid and a search over heads.

    python experiments/softpag/run.py --denoiser RUN --judge RUN [--out DIR]

Writes table.md, strength.png and heads.png into DIR (none: beside this file).
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from attnjax.analysis import head_hunter
from attnjax.analysis.sample_quality import (
    Judge,
    compared,
    data_features,
    frechet_distance,
)
from attnjax.decoding import pictures
from attnjax.decoding.run import load_run
from attnjax.tasks.denoising import perturbing

HERE = Path(__file__).parent
COLUMNS = ("log_p", "frechet", "precision", "recall")
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--denoiser", required=True, help="a run of a denoiser")
    parser.add_argument("--judge", required=True, help="a run of a classifier")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument(
        "--classes", choices=("none", "all"), default="none", help="what is asked for"
    )
    parser.add_argument("--samples", type=int, default=200, help="of a row")
    parser.add_argument("--num_steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 2.0])
    parser.add_argument("--guidance", type=float, default=2.0, help="of the CFG rows")
    parser.add_argument("--search_samples", type=int, default=100)
    parser.add_argument("--search_scale", type=float, default=2.0)
    parser.add_argument("--search_strength", type=float, default=1.0)
    parser.add_argument("--per_round", type=int, default=1, help="heads a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def asked(judge: Judge, count: int, args) -> np.ndarray:
    """Labels [count]: every class as often, or no class."""
    if args.classes == "none":
        return judge.denoiser.labels(["no_class"] * count)
    return np.arange(count) % len(judge.denoiser.class_names)


def log_p(judge: Judge, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log p, by the judge, of the class that was asked for, or of the one it names."""
    if judge.denoiser.model.null_label in labels:
        labels = judge.look(images)[1]
    return judge.log_probabilities(images, labels)


def hunt(judge: Judge, args) -> tuple[float, head_hunter.Found]:
    """The unguided score, and the heads that a greedy search finds."""
    trial = head_hunter.Trial(
        judge.denoiser,
        asked(judge, args.search_samples, args),
        partial(log_p, judge),
        steps=args.num_steps,
        seed=args.seed + 1,
        perturb_scale=args.search_scale,
        perturb_strength=args.search_strength,
    )
    plain = trial(())
    print(f"unguided: {plain:.4f}", flush=True)
    found = head_hunter.search(
        trial,
        trial.pool,
        per_round=args.per_round,
        rounds=args.rounds,
        told=lambda line: print(line, flush=True),
    )
    return plain, found


def rows_of(depth: int, found: tuple, args) -> list[tuple[str, dict]]:
    """(name, settings of the draw) of every row."""
    rows, guides = [("none", {})], args.classes == "all"
    if guides:
        rows.append(("CFG", {"guidance": args.guidance}))
    sets = {f"layer {i}": f"{i}:all" for i in range(depth)}
    sets |= {"all heads": "all", "found heads": perturbing.text_of(found)}
    grid = itertools.product(sets.items(), args.scales, args.strengths)
    for (name, heads), scale, strength in grid:
        more = {"perturb_scale": scale, "perturb_strength": strength}
        rows.append((name, {**more, "perturb_heads": heads}))
    for name in ("all heads", "found heads") if guides else ():
        more = {"perturb_scale": args.scales[0], "perturb_strength": 0.5}
        more |= {"guidance": args.guidance, "perturb_heads": sets[name]}
        rows.append((f"CFG + {name}", more))
    return rows


def grid(judge: Judge, found: tuple, args) -> list[str]:
    """The lines of the table of strengths, a row a setting."""
    run = judge.denoiser
    labels = asked(judge, args.samples, args)
    names = ["no_class"] * len(labels) if args.classes == "none" else labels.tolist()
    real, held_out = data_features(judge)
    lines = [
        "| guidance | CFG | w | u | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (4 + len(COLUMNS)),
    ]
    for name, settings in rows_of(len(run.model.names), found, args):
        made = run.draw(names, steps=args.num_steps, seed=args.seed, **settings)
        row = compared(judge, made, labels, real=real)
        row["log_p"] = np.mean(log_p(judge, made, labels))
        shown = (
            settings.get("guidance", 1.0),
            settings.get("perturb_scale", 0.0),
            settings.get("perturb_strength", "-"),
        )
        cells = [name, *map(str, shown), *(f"{row[c]:.3f}" for c in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    distance = frechet_distance(held_out, real)
    lines.append(f"| held-out images | - | - | - | - | {distance:.3f} | - | - |")
    return lines


def strengths(run, found: tuple, args) -> np.ndarray:
    """A sheet: a strength a row from 0, a noise a column (a class each where classes
    are asked for), of the found heads."""
    labels = np.arange(len(run.class_names)).tolist()
    if args.classes == "none":
        labels = ["no_class"] * len(labels)
    made = []
    for strength in SHOWN:
        more = {
            "perturb_scale": args.search_scale,
            "perturb_strength": strength,
            "perturb_heads": perturbing.text_of(found),
        }
        more = more if strength else {}
        made.append(run.draw(labels, steps=args.num_steps, seed=args.seed, **more))
    return pictures.sheet(run.pixels(np.concatenate(made)), columns=len(labels))


def heat_map(plain: float, found: head_hunter.Found, file: Path) -> None:
    """The first round's scores beside the unguided one, layer by head."""
    table = found.rounds[0]
    scores = np.full(np.max(list(table), axis=0) + 1, np.nan)
    for pair, score in table.items():
        scores[pair] = score - plain
    figure, axes = plt.subplots(figsize=(4.5, 3.5))
    limit = 1.6 * np.nanmax(np.abs(scores))  # pale enough to read numbers on
    image = axes.imshow(scores, cmap="RdBu", vmin=-limit, vmax=limit)
    for (layer, head), score in np.ndenumerate(scores):
        if np.isfinite(score):
            axes.text(head, layer, f"{score:.2f}", ha="center", va="center", size=7)
    for number, (layer, head) in enumerate(found.heads, 1):
        where = {"ha": "left", "va": "top", "size": 7, "weight": "bold"}
        axes.text(head - 0.45, layer - 0.45, f"#{number}", **where)
    axes.set(xlabel="head", ylabel="layer", title="gain in log p, nats")
    axes.set_xticks(range(scores.shape[1]))
    axes.set_yticks(range(scores.shape[0]))
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def heads_table(plain: float, found: head_hunter.Found) -> list[str]:
    """The lines of the table of heads: chosen order, and each round's score."""
    rounds = range(1, len(found.rounds) + 1)
    lines = [
        "| layer | head | chosen | " + " | ".join(f"round {n}" for n in rounds) + " |",
        "|" + "---|" * (3 + len(found.rounds)),
    ]
    for pair in found.rounds[0]:
        chosen = f"#{found.heads.index(pair) + 1}" if pair in found.heads else ""
        cells = [f"{t[pair] - plain:+.3f}" if pair in t else "" for t in found.rounds]
        lines.append(
            f"| {pair[0]} | {pair[1]} | {chosen} | " + " | ".join(cells) + " |"
        )
    return lines


def main() -> None:
    """Search, then the grid."""
    args = options()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    judge = Judge(load_run(args.judge), load_run(args.denoiser))
    plain, found = hunt(judge, args)
    heat_map(plain, found, args.out / "heads.png")
    sheet = strengths(judge.denoiser, found.heads, args)
    large = sheet.repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray(large).save(args.out / "strength.png")
    lines = grid(judge, found.heads, args)
    text = [
        f"Classes asked for: {args.classes}. {args.samples} samples a row, "
        f"{args.num_steps} steps. Found heads: {perturbing.text_of(found.heads)}.",
        "",
        *lines,
        "",
        f"Mean log p less the unguided {plain:.3f}, in nats, with a head beside those "
        f"chosen before (w={args.search_scale:g}, u={args.search_strength:g}, "
        f"{args.search_samples} samples).",
        "",
        *heads_table(plain, found),
    ]
    (args.out / "table.md").write_text("\n".join(text) + "\n")
    print(f"{time.monotonic() - started:.0f} s; wrote {args.out / 'table.md'}")


if __name__ == "__main__":
    main()
