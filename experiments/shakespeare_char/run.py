"""Train configs/lm_shakespeare.py over several seeds and write the table.

    python experiments/shakespeare_char/run.py --data_dir DATA_DIR --workdir WORKDIR

DATA_DIR holds the TensorFlow Datasets folder `tiny_shakespeare`. Finished seeds are not
trained again. Writes results.csv and table.md beside this file.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# nanoGPT's own mean over three seeds on every non-overlapping window of the same tenth
# of the text, measured with its code on a two-core machine.
NANOGPT = (1.907, 1.903, 1.911)


def train(seed: int, data_dir: str, workdir: Path) -> dict:
    """Train one seed, or find it done; its summary."""
    run = workdir / f"seed_{seed}"
    command = [sys.executable, "-m", "attnjax.train"]
    command += ["--config", str(ROOT / "configs" / "lm_shakespeare.py")]
    command += [f"--config.data.data_dir={data_dir}", f"--config.train.seed={seed}"]
    command += ["--config.eval.every=none", f"--workdir={run}"]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        summary = train(seed, args.data_dir, args.workdir)
        rows.append(
            {
                "seed": seed,
                "held_out_loss": round(summary["final"]["loss"], 5),
                "tokens_per_second": round(summary["time"]["tokens_per_second"]),
                "parameters": summary["parameters"],
            }
        )
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "table.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict]) -> str:
    """The committed table."""
    losses = [row["held_out_loss"] for row in rows]
    mean, theirs = statistics.mean(losses), statistics.mean(NANOGPT)
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    lines = [
        "| | seeds | held-out loss, nats per character | spread |",
        "|---|---|---|---|",
        f"| attnjax | {len(rows)} | {mean:.4f} | {spread:.4f} |",
        f"| nanoGPT | {len(NANOGPT)} | {theirs:.4f} "
        f"| {statistics.stdev(NANOGPT):.4f} |",
        "",
        f"Difference of the means: {mean - theirs:+.4f} nats. Made on "
        f"{platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
