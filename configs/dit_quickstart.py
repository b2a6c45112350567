"""A Diffusion Transformer that draws scikit-learn's handwritten digits.

Command: python -m attnjax.train --config configs/dit_quickstart.py --workdir runs/dit
Expected: after 2 min 7 s on two cores a held-out loss of 0.347 (seed 0), and digits of
which a classifier names 97.6 % right without guidance and 99.9 % with guidance 2
(docs/dit.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The quickstart of diffusion."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "dit"
    config.model.layers = "attention"
    config.model.patch_size = 2
    config.model.num_layers = 4
    config.model.embed_dim = 96
    config.model.num_heads = 4

    config.task = ConfigDict()
    config.task.noise = ConfigDict()
    config.task.noise.process = "flow"

    config.data = ConfigDict()
    config.data.name = "digits"

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 0.0
    config.optim.ema_decay = 0.999

    config.train = ConfigDict()
    config.train.steps = 6000
    config.train.batch_size = 64
    config.train.steps_per_dispatch = 20
    config.train.log_every = 100
    config.train.save_every = 2000

    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.draw = ConfigDict()
    config.eval.draw.guidance = 2.0
    return config
