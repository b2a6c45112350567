"""Plan the four language models on five targets: writes table.json and table.md.

    python docs/planning/make_table.py [MODEL ...]

Needs the extra `aot` and a quarter of an hour on two cores. Of each model and target,
`--search` chose mesh, remat policy and micro-batches. With MODEL only those rows are
made anew.
"""

import json
import sys
from pathlib import Path

from attnjax.planning import planner, search, targets
from attnjax.planning.text import mesh_text, number, seconds, size

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODELS = ("gpt2_124m", "gpt2_1.5b", "llama_8b", "llama_70b")
TARGETS = ("h200:8", "h200:64", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
TRIES = 4


def main(wanted: list[str]) -> None:
    """Fill in what is wanted, and write both files after every row."""
    file = HERE / "table.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    for model in wanted or MODELS:
        for target in TARGETS:
            rows[f"{model} on {target}"] = row(model, target)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            (HERE / "table.md").write_text(markdown(rows))


def row(model: str, name: str) -> dict:
    """The best setting found for a model on a target."""
    from attnjax.core import config as configs
    from attnjax.training import experiment

    target = targets.parse(name)
    targets.prepare(target)
    config = experiment.resolve(configs.load_file(f"{ROOT}/configs/lm/{model}.py"))
    print(f"{model} on {name}", flush=True)
    found = search.search(config, target, tries=TRIES, enough=1, say=print)
    plan = planner.to_json(found.plans[0])
    del plan["config"], plan["chip"]
    print("  " + search.lines(found, 1)[1], flush=True)
    return {"model": model, "compiled": len(found.plans), **plan}


def markdown(rows: dict) -> str:
    """The table of all rows."""
    out = [
        "# Four language models on five targets",
        "",
        "Made by `python docs/planning/make_table.py`. Mesh, remat policy and",
        "micro-batches: the best of at most four that a search compiled. Memory is per",
        "device; times are lower bounds of one training step. Nothing here was run.",
        "",
        "| model | target | setting | memory | usable | fits | step, at least "
        "| tokens/s, at most | MFU, at most | bound by | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for target in TARGETS:
            one = rows.get(f"{model} on {target}")
            if one is not None:
                out.append("| " + " | ".join(_cells(one)) + " |")
    return "\n".join([*out, "", *_notes(rows)])


def _cells(one: dict) -> list[str]:
    train = one["train"]
    memory, guess = train["bytes_per_device"], train["estimate"]
    setting = (
        f"{mesh_text(one['mesh'])}, remat={one['remat']}, "
        f"accumulate={one['accumulate']}"
    )
    if train["fits"] is None:
        fits = f"not compiled: {train['error']}"
    elif train["fits"]:
        fits = f"yes, {size(memory['spare'])} to spare"
    else:
        fits = f"no, by {size(-memory['spare'])}"
    times = ["", "", "", ""]
    if guess is not None and train["fits"]:
        bounds = {k: guess[k] for k in ("compute", "memory", "network")}
        times = [
            seconds(guess["step"]),
            number(one["tokens_per_step"] / guess["step"]).strip(),
            f"{100 * guess['mfu']:.0f} %",
            max(bounds, key=bounds.get),
        ]
    total = "" if memory["total"] is None else size(memory["total"])
    return [
        f"{one['model']} ({number(one['parameters']).strip()})",
        one["target"],
        setting,
        total,
        size(memory["usable"]),
        fits,
        *times,
        f"{train['compile_seconds']:.0f} s",
    ]


def _notes(rows: dict) -> list[str]:
    methods: dict[str, list[str]] = {}
    for key, one in rows.items():
        guess = one["train"]["estimate"]
        if guess is not None:
            methods.setdefault(guess["method"], []).append(key)
    out = ["Where the times come from:", ""]
    for method, keys in methods.items():
        out.append(f"- {method}: {len(keys)} rows.")
    stands = {
        f"{c['used']} stands in for {c['wanted']}: {c['reason']}"
        for one in rows.values()
        for c in one["train"]["attention"]
        if c["reason"]
    }
    return [*out, *(f"- {line}." for line in sorted(stands)), ""]


if __name__ == "__main__":
    main(sys.argv[1:])
