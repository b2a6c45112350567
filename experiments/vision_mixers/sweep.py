"""Every bidirectional mechanism of the catalog in one Vision Transformer.

Command: python -m attnjax.sweep --sweep experiments/vision_mixers/sweep.py
  --workdir runs/vision_mixers --jobs 2
The images are found in $TFDS_DATA_DIR (`mnist_t10k`).
"""

import math

from attnjax.studies import Table, concat, point
from attnjax.studies import seeds as over_seeds

SEEDS = 3
TOKENS = 64
# Equal parameters: the width of the MLPs makes up for those of the mechanism.
BASE = {"model.params": "match", "train.steps": 800, "eval.every": 800}


def _options(name, **options):
    return {"model.layers": name} | {
        f"model.mixers.{name}.{key}": value for key, value in options.items()
    }


# The grid has 8 x 8 patches: windows are 4 x 4, halos 2, neighbourhoods 5 x 5.
MECHANISMS = {
    "softmax": {},
    "gated": _options("gated_attention"),
    "talking heads": _options("talking_heads"),
    "grouped differential": _options("grouped_differential_attention"),
    "affine scaled": _options("affine_scaled_attention"),
    "geometric": _options("geometric_attention"),
    "sigmoid": _options(
        "attention_sink_survey", weight_map="sigmoid", bias=-math.log(TOKENS)
    ),
    "softplus, LSSAR": _options("softplus_attention"),
    "complexformer": _options("complexformer"),
    "GAAM": _options("gaam"),
    "latent (MLA)": _options("mla"),
    "mixture of heads": _options("moh"),
    "reduced (shared Q, K)": _options("reducing_the_transformer"),
    "linear": _options("linear_attention"),
    "neighbourhood": _options("neighborhood_attention", window=5),
    "halo": _options("halonet", block=4, halo=2),
    "block and grid (MaxViT)": _options("maxvit", window=4),
    "window and channel (DaViT)": _options("davit", window=4),
}


def sweep():
    rows = [
        point("configs/vit/mnist.py", {**BASE, **settings}, attention=name)
        for name, settings in MECHANISMS.items()
    ]
    return over_seeds(concat(*rows), SEEDS)


def table():
    return Table(
        rows=("attention",),
        metrics=("eval/accuracy", "eval/loss"),
        baseline={"attention": "softmax"},
        title="Bidirectional mechanisms on MNIST",
        caption=(
            "1,000 held-out images, after 800 steps of 64 images; parameters equal to "
            "softmax attention's."
        ),
    )
