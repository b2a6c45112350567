"""Every bidirectional mechanism of the catalog in a Vision and a Diffusion Transformer.

Command: python -m attnjax.sweep --sweep experiments/vision_mixers/sweep.py
  --workdir runs/vision_mixers --jobs 2
The images of the ViT are found in $TFDS_DATA_DIR (`mnist_t10k`), those of the DiT in
scikit-learn. One point more, the quickstart of classification, judges the samples.
"""

import math

from attnjax.studies import Evaluation, Table, concat, evaluated, point
from attnjax.studies import seeds as over_seeds

SEEDS = 3
# Equal parameters: the width of the MLPs makes up for those of the mechanism.
VIT = {"model.params": "match", "train.steps": 800, "eval.every": 800}
DIT = {
    "model.params": "match",
    "model.embed_dim": 64,
    "optim.learning_rate": 2e-3,
    "optim.ema_decay": 0.995,
    "train.steps": 2500,
    "train.save_every": None,
    "eval.every": 2500,
    "eval.draw": {"per_class": 0},
}
JUDGE = {"attention": "the judge"}
SAMPLES = {"per_class": 100, "sampler": "heun", "steps": 25}


def _options(name, **options):
    return {"model.layers": name} | {
        f"model.mixers.{name}.{key}": value for key, value in options.items()
    }


def _every_second_shifted(name, **options):
    """Layers "window shifted", again and again to the depth of the model."""
    return {
        "model.layers": "window shifted",
        "model.mixers.window": {"type": name, **options},
        "model.mixers.shifted": {"type": name, "shifted": True, **options},
    }


def mechanisms(side):
    """Row -> overrides, for a grid of side x side patches: windows are half as wide,
    halos a quarter, neighbourhoods one more than windows."""
    window, halo = side // 2, side // 4
    return {
        "softmax": {},
        "gated": _options("gated_attention"),
        "talking heads": _options("talking_heads"),
        "grouped differential": _options("grouped_differential_attention"),
        "affine scaled": _options("affine_scaled_attention"),
        "doubly stochastic": _options("geometric_attention", anchor="plan"),
        "sigmoid": _options(
            "attention_sink_survey", weight_map="sigmoid", bias=-math.log(side**2)
        ),
        "softplus, LSSAR": _options("softplus_attention"),
        "complexformer": _options("complexformer"),
        "GAAM": _options("gaam"),
        "latent (MLA)": _options("mla"),
        "mixture of heads": _options("moh"),
        "reduced (shared Q, K)": _options("reducing_the_transformer"),
        "linear": _options("linear_attention"),
        "neighbourhood": _options("neighborhood_attention", window=window + 1),
        "halo": _options("halonet", block=window, halo=halo),
        "block and grid (MaxViT)": _options("maxvit", window=window),
        "window and channel (DaViT)": _options("davit", window=window),
        "shifted windows (Swin v2)": _every_second_shifted("swin_v2", window=window),
        "anchored windows": _options("shift_equivariance", window=window),
        "reversed (DependencyViT)": _options("dependencyvit"),
        "TAP and ADL": _options("tap_adl"),
    }


def sweep():
    judge = point("configs/vit_quickstart.py", seed=0, **JUDGE)
    classified = [
        point("configs/vit/mnist.py", {**VIT, **settings}, attention=name, model="vit")
        for name, settings in mechanisms(8).items()
    ]
    drawn = [
        point(
            "configs/dit_quickstart.py",
            {**DIT, **settings},
            attention=name,
            model="dit",
        )
        for name, settings in mechanisms(4).items()
    ]
    # Seed by seed: a budget that ends early leaves every row something.
    drawn = concat(*(over_seeds(concat(*drawn), [seed]) for seed in range(SEEDS)))
    judged = evaluated(drawn, [Evaluation("samples", judge=JUDGE, samples=SAMPLES)])
    return concat(judge, over_seeds(concat(*classified), SEEDS), judged)


def table():
    return Table(
        rows=("attention",),
        columns=("model",),
        metrics=("eval/accuracy", "samples/frechet", "samples/named", "eval/loss"),
        baseline={"attention": "softmax"},
        uncompared=("samples/named", "eval/loss"),
        leave_out=JUDGE,
        title="Bidirectional mechanisms on images",
        caption=(
            "vit: 1,000 held-out images of MNIST, after 800 steps of 64 images. dit: "
            "1,000 samples of handwritten digits, after 2,500 steps of 64 images; "
            "Frechet distance in the features of the judge. Parameters equal to "
            "softmax attention's."
        ),
    )
