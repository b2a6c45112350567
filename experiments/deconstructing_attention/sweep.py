"""Deconstructed attention: what each principle is worth, alone and in hybrids.

Command: python -m attnjax.sweep --sweep experiments/deconstructing_attention/sweep.py
  --workdir runs/deconstructing_attention --jobs 2
The text is found in $TFDS_DATA_DIR (`tiny_shakespeare`).
"""

from attnjax.models.hybrids import SCHEDULES, hybrid, skipped
from attnjax.studies import Evaluation, PaperValue, Table, concat, evaluated, point
from attnjax.studies import seeds as over_seeds

LAYERS = 8
SEEDS = 3
SCHEDULED = "non_approximate"  # the variant that goes through all schedules
BASE = {
    "model.num_kv_heads": None,
    "model.max_len": 64,
    "data.seq_len": 64,
}
# The text of fixed_seq_qk, as ids of the sorted alphabet of the data set.
ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEXT = "A fixed text of as many letters as the context has; any will do."
VARIANTS = (
    "mlp",
    "approximate",
    "non_approximate",
    "rnd_emb_qk",
    "fixed_seq_qk",
    "static_emb_qk",
)
ALL_SQUARES = "approximate, all squares"
# WikiText perplexity of the 500M models: in all layers, and in the even hybrid.
PAPER = {
    "standard": (38.1, 38.1),
    "mlp": (993.5, 45.8),
    "approximate": (47.9, 39.4),
    "non_approximate": (9e4, 39.4),
    "rnd_emb_qk": (84.8, 39.3),
    "fixed_seq_qk": (79.1, 38.5),
    "static_emb_qk": (79.9, 38.7),
}
SOURCE = "arXiv 2510.11602, main table: WikiText perplexity, 500M parameters"


def _point(variant, schedule):
    settings = {"type": "deconstructing_attention", "variant": variant.split(",")[0]}
    if variant == ALL_SQUARES:
        settings["second_order"] = "full"
    if variant == "fixed_seq_qk":
        settings["sequence"] = [ALPHABET.index(letter) for letter in TEXT]
    names = hybrid(schedule, LAYERS, simple="simple")
    layers = {"model.layers": list(names), "model.num_layers": None}
    labels = {"variant": variant, "schedule": schedule}
    made = point(
        "configs/lm_study.py",
        {**BASE, **layers, "model.mixers.simple": settings},
        **labels,
    )
    if schedule != "even":
        return made
    kept = skipped(names, simple="simple")
    return evaluated(made, [Evaluation("skip", keep_layers=kept)])


def sweep():
    standard = {**BASE, "model.num_layers": LAYERS}
    rows = [
        point("configs/lm_study.py", standard, variant="standard", schedule="uniform")
    ]
    rows += [_point(variant, "uniform") for variant in VARIANTS]
    rows += [_point(variant, "even") for variant in VARIANTS]
    rows += [
        _point(SCHEDULED, schedule)
        for schedule in SCHEDULES
        if schedule not in ("uniform", "even")
    ]
    # The weights of this form are always positive; it takes four times as long.
    rows += [_point(ALL_SQUARES, schedule) for schedule in ("uniform", "even")]
    return over_seeds(concat(*rows), SEEDS)


def table():
    paper = [
        PaperValue(
            {"variant": variant, "schedule": schedule},
            "eval/perplexity",
            values[column],
            SOURCE,
        )
        for variant, values in PAPER.items()
        for column, schedule in enumerate(("uniform", "even"))
        if (variant, schedule) != ("standard", "even")
    ]
    return Table(
        rows=("variant", "schedule"),
        metrics=("eval/loss", "eval/perplexity", "skip/loss"),
        uncompared=("eval/perplexity", "skip/loss"),
        baseline={"variant": "standard", "schedule": "uniform"},
        paper=tuple(paper),
        title="Deconstructed attention: variants and layer schedules",
        caption=(
            "Held-out Shakespeare, nats and perplexity a character. skip: the trained "
            "hybrid with its simple layers left out."
        ),
    )
