"""The size of the decode state of runs whose summary does not say it.

Runs of older versions have no such line, and a model without a decode form has none
that could say a number. The resolved config gives the number, or why there is none.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence

from attnjax.core import mappings
from attnjax.studies.collect import Run
from attnjax.studies.table import show_labels
from attnjax.training.feeds.text import DECODE_STATE

_VOCABULARY = 256  # any: no decode state depends on it
_SHOWN = 4


def completed(run: Run) -> Run:
    """A finished run with the size in its summary, where it is known."""
    is_known = run.summary.get(DECODE_STATE) is not None
    if not run.is_done or run.unit != "token" or is_known:
        return run
    size, _ = _of(run)
    return dataclasses.replace(run, summary={**run.summary, DECODE_STATE: size})


def notes(runs: Sequence[Run], *, seed: str) -> list[str]:
    """Footnotes about the finished runs that have no size: which, and why.

    Args:
        runs: all of them.
        seed: the label of repetitions, which is left out.
    """
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        is_text = run.is_done and run.unit == "token"
        if is_text and run.summary.get(DECODE_STATE) is None:
            labels = {k: v for k, v in run.labels.items() if k != seed}
            why = _of(run)[1] or "unknown"
            found.setdefault(why, {})[show_labels(labels) or run.path.name] = None
    return [
        f"State B/token is empty for {_listed(list(names))}: {why}"
        for why, names in found.items()
    ]


def _listed(names: list[str]) -> str:
    more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more


def _of(run: Run) -> tuple[float | None, str]:
    """(bytes a token or None, why None)."""
    if run.config is None:
        return None, "there is no config.json."
    parts = {name: run.config.get(name) for name in ("model", "data")}
    return _computed(mappings.canonical(parts))


@functools.cache
def _computed(parts: str) -> tuple[float | None, str]:
    from attnjax.training import experiment
    from attnjax.training.feeds.text import decode_state_per_token

    try:
        config = experiment.resolve(json.loads(parts))
        model = experiment.build_model(config, {"vocab_size": _VOCABULARY})
        return decode_state_per_token(model, config["data"]["seq_len"]), ""
    except Exception as error:
        # A config of another version, or a mechanism whose file is gone or changed: the
        # rest of the report does not need it.
        return None, " ".join(str(error).split()) or type(error).__name__
