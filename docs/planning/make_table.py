"""Plan the four language models on five targets: writes table.json and table.md.

    python docs/planning/make_table.py [--anew] [MODEL ...]

Needs the extra `aot` and half an hour on two cores. Of each model and target `--search`
chose mesh, remat policy and micro-batches. Cells that table.json has are kept, so a
second run makes only what is missing; --anew makes all of them (or of MODEL) again. A
cell that takes more than LIMIT seconds of processor time gets a row that says so.
"""

import json
import multiprocessing
import resource
import sys
from pathlib import Path

from attnjax.planning import planner, search, targets
from attnjax.planning.text import mesh_text, number, seconds, size

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODELS = ("gpt2_124m", "gpt2_1.5b", "llama_8b", "llama_70b")
TARGETS = ("h200:8", "h200:64", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
TRIES = 4
LIMIT = 360
INTRODUCTION = f"""\
Made by `python docs/planning/make_table.py`, which needs no accelerator: the programs
were compiled, none was run. Mesh, remat policy and micro-batches were chosen by search
(`python -m attnjax.plan --search`): a formula weighs all possible settings, the
cheapest that should fit is compiled, and the first of at most {TRIES} that does fit is
taken. Memory is per device; step times are lower bounds, tokens/s and MFU upper bounds.
""".splitlines()
NOTES = """\
- MFU counts every pair of tokens of attention, causal or not, but loops over blocks of
  attention whose length depends on the data are counted as one turn: where products are
  the bound it may only be said that MFU is at most 100 %.
- Usable memory is the device's without what the runtime keeps for itself; this and
  every peak is in `attnjax/planning/chips.py` with its source.
""".splitlines()


def main(words: list[str]) -> None:
    """Fill in what is missing, and write both files after every cell."""
    wanted = [word for word in words if word != "--anew"] or list(MODELS)
    file = HERE / "table.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    if "--anew" in words:
        rows = {key: row for key, row in rows.items() if row["model"] not in wanted}
    for target in TARGETS:
        for model in wanted:
            if f"{model} on {target}" not in rows:
                print(f"{model} on {target}", flush=True)
                rows[f"{model} on {target}"] = limited(model, target)
                write(rows)
    write(rows)


def write(rows: dict) -> None:
    """Both files, the rows in the order of the table."""
    keys = [f"{model} on {target}" for model in MODELS for target in TARGETS]
    rows = {key: rows[key] for key in keys if key in rows}
    (HERE / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "table.md").write_text(markdown(rows))


def limited(model: str, target: str) -> dict:
    """`row` in a process of its own, which the system ends at the limit."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, model, target))
    before = _children_seconds()
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = None
    child.join()
    if found is not None:
        return found
    if _children_seconds() - before < 0.9 * LIMIT:
        raise SystemExit(f"{model} on {target}: failed with {child.exitcode}")
    return {"model": model, "target": target, "gave_up_after": LIMIT}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _child(pipe, model: str, target: str) -> None:
    # Nothing in the process can interrupt a compilation; the system ends it.
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    pipe.send(row(model, target))


def row(model: str, name: str) -> dict:
    """The best setting found for a model on a target."""
    from attnjax.core import config as configs
    from attnjax.training import experiment

    target = targets.parse(name)
    targets.prepare(target)
    config = experiment.resolve(configs.load_file(f"{ROOT}/configs/lm/{model}.py"))
    found = search.search(config, target, tries=TRIES, enough=1, say=print)
    plan = planner.to_json(found.plans[0])
    del plan["config"], plan["chip"]
    print("  " + search.lines(found, 1)[1], flush=True)
    return {
        "model": model,
        "possible": found.possible,
        "tried": len(found.plans),
        **plan,
    }


def markdown(rows: dict) -> str:
    """The table of all rows."""
    out = [
        "# Four language models on five targets",
        "",
        *INTRODUCTION,
        "",
        "| model | target | setting | memory, GiB | fits | step, at least "
        "| tokens/s, at most | MFU, at most | bound by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for target in TARGETS:
            missing = {"model": model, "target": target}
            cells = _cells(rows.get(f"{model} on {target}", missing))
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", *_notes(rows)])


def _cells(one: dict) -> list[str]:
    if "train" not in one:
        gave_up = "not compiled yet"
        if "gave_up_after" in one:
            gave_up = f"not compiled in {one['gave_up_after']} s of processor time"
        return [one["model"], one["target"], "", "", gave_up, *[""] * 4]
    train = one["train"]
    memory, guess = train["bytes_per_device"], train["estimate"]
    setting = (
        f"{mesh_text(one['mesh'])}, remat={one['remat']}, "
        f"accumulate={one['accumulate']}"
    )
    if train["fits"] is None:
        fits = f"not compiled: {train['error']}"
    else:
        fits = "yes" if train["fits"] else f"no, by {size(-memory['spare'])}"
    times = ["", "", "", "module not readable" if train.get("unread") else ""]
    if guess is not None and train["fits"]:
        times = [
            seconds(guess["step"]),
            number(one["tokens_per_step"] / guess["step"]).strip(),
            f"{100 * guess['mfu']:.0f} %",
            _bound(guess),
        ]
    total = "?" if memory["total"] is None else f"{memory['total'] / 2**30:.1f}"
    return [
        f"{one['model']} ({one['parameters'] / 1e9:.3g} B)",
        one["target"],
        setting,
        f"{total} of {memory['usable'] / 2**30:.1f}",
        fits,
        *times,
    ]


def _bound(guess: dict) -> str:
    """What takes longest; "XLA" where the step is the compiler's own estimate."""
    bounds = {name: guess[name] for name in ("compute", "memory", "network")}
    longest = max(bounds, key=bounds.get)
    return longest if bounds[longest] >= 0.999 * guess["step"] else "XLA"


def _notes(rows: dict) -> list[str]:
    methods: dict[str, list[str]] = {}
    rows = {key: one for key, one in rows.items() if "train" in one}
    for key, one in rows.items():
        guess = one["train"]["estimate"]
        if guess is not None and one["train"]["fits"]:
            methods.setdefault(guess["method"], []).append(key)
    out = ["Where the times come from:", ""]
    for method, keys in methods.items():
        out.append(f"- {method}: {len(keys)} of {len(rows)} rows.")
    stands = {
        f"{c['used']} stands in for {c['wanted']}: {c['reason']}"
        for one in rows.values()
        for c in one["train"]["attention"]
        if c["reason"]
    }
    kernels = {c["used"] for one in rows.values() for c in one["train"]["attention"]}
    out += [
        "",
        "What to know:",
        "",
        f"- Attention is computed by: {', '.join(sorted(kernels))}.",
        *(f"- {line}." for line in sorted(stands)),
        *NOTES,
    ]
    return [*out, ""]


if __name__ == "__main__":
    main(sys.argv[1:])
