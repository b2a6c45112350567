"""Run directories with the files that training writes, made without training."""

import json
from pathlib import Path

import numpy as np

from attnjax.core import mappings
from attnjax.training import experiment, identity, metrics

STEPS = 40
EVERY = 10
LOSSES = {"attention": 2.0, "gated_attention": 1.9, "linear_attention": 2.3}


def config_of(mixer: str, seed: int, **overrides) -> dict:
    """The resolved config of a tiny run; overrides by dotted key, "." as "__"."""
    given = {
        "model": {"layers": mixer, "num_layers": 2, "embed_dim": 16, "num_heads": 2},
        "data": {"name": "stdlib", "seq_len": 32},
        "train": {"steps": STEPS, "seed": seed},
    }
    for key, value in overrides.items():
        group, name = key.split("__")
        given.setdefault(group, {})[name] = value
    return experiment.resolve(given)


def hash_of(config: dict) -> str:
    return mappings.digest(config, exclude=identity.EXCLUDES)[:16]


def loss_of(mixer: str, seed: int, step: int) -> float:
    """A held-out loss that falls, differs by seed, and rises a little at the end."""
    noise = 0.05 * np.random.default_rng([seed, len(mixer)]).normal()
    worse = 0.1 if step == STEPS else 0.0
    return LOSSES[mixer] + noise + 3.0 * np.exp(-step / 8) + worse


def write_run(
    path: Path, config: dict, *, steps: int = STEPS, speed: float = 1000.0
) -> Path:
    """A run that has trained `steps` steps; finished when that is all of them."""
    mixer, seed = config["model"]["layers"], config["train"]["seed"]
    path.mkdir(parents=True)
    finished = steps >= config["train"]["steps"]
    manifest = {"config_hash": mappings.digest(config), "starts": [], "ends": []}
    manifest |= {"finished_step": steps} if finished else {}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.json").write_text(json.dumps(config))
    rows = []
    for step in range(EVERY, steps + 1, EVERY):
        loss = loss_of(mixer, seed, step)
        time = {"seconds_per_step": 1 / speed, "tokens_per_second": speed * (1 + seed)}
        common = {"step": step, "loss": loss}
        rows.append({**common, "split": "train", "loss": loss - 0.1, "time": time})
        rows.append({**common, "split": "eval", "accuracy": 1 / loss, "time": {}})
    text = "".join(json.dumps(metrics.encode(row)) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text)
    if finished:
        summary = {
            "final": {"loss": rows[-1]["loss"], "accuracy": rows[-1]["accuracy"]},
            "best": {"loss": rows[-3]["loss"], "step": rows[-3]["step"]},
            "steps": steps,
            "parameters": 1234 if mixer == "attention" else 2345,
            "forward_flops_per_token": 5e5 if mixer == "attention" else 1e6,
            "decode_state_bytes_per_token": 448.0 if mixer == "attention" else 512.0,
            "time": {"tokens_per_second": speed},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_sweep(
    folder: Path,
    *,
    mixers=("attention", "gated_attention"),
    seeds=(0, 1, 2),
    table: dict | None = None,
    missing=(),
    failed=(),
    unfinished=(),
    speed: float = 1000.0,
) -> Path:
    """A sweep's work directory; places in the last lists are (mixer, seed)."""
    points = []
    for mixer in mixers:
        for seed in seeds:
            config = config_of(mixer, seed)
            name, place = hash_of(config), (mixer, seed)
            labels = {"mixer": mixer, "seed": seed}
            points.append(
                {"hash": name, "config": "c.py", "overrides": {}, "labels": labels}
            )
            if place in failed:
                _write_state(folder, name, "failed", "error: the disk is full.")
            elif place in unfinished:
                write_run(folder / "points" / name, config, steps=20, speed=speed)
            elif place not in missing:
                write_run(folder / "points" / name, config, speed=speed)
                _write_state(folder, name, "done", None)
    content = {"format": 1, "sweep": "sweep.py", "sha256": "", "points": points}
    content["table"] = table
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def _write_state(folder: Path, name: str, state: str, error: str | None) -> None:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    value = {"hash": name, "state": state, "attempt": 1, "error": error}
    (folder / "state" / f"{name}.json").write_text(json.dumps(value))
