"""Gated against plain softmax attention: two layers, five seeds, Python's own text.

Command: python -m attnjax.sweep --sweep experiments/smoke/sweep.py
  --workdir runs/smoke --jobs 2
"""

from attnjax.studies import Table, grid, point, seeds

# The quickstart, cut to what two cores train in less than a minute.
SMALL = {
    "model.num_layers": 2,
    "model.embed_dim": 128,
    "model.num_heads": 4,
    "data.seq_len": 128,
    "train.steps": 300,
    "train.log_every": 10,
    "train.save_every": 150,
    "train.tensorboard": False,
    "train.sample_tokens": 0,
    "eval.every": 50,
    "eval.batches": 64,
}
MIXERS = {"softmax": "attention", "gated": "gated_attention"}


def sweep():
    base = point("configs/quickstart.py", SMALL)
    rows = grid(base, {"model.layers": MIXERS}, names={"model.layers": "mixer"})
    return seeds(rows, 5)


def table():
    return Table(
        rows=("mixer",),
        metrics=("eval/loss", "eval/bits_per_byte"),
        baseline={"mixer": "softmax"},
        title="Smoke test: gated and plain softmax attention",
        caption=(
            "Held-out loss in nats a token and bits a byte of the text of Python's "
            "own library and its language reference."
        ),
    )
