"""A Vision Transformer on scikit-learn's handwritten digits.

Command: python -m attnjax.train --config configs/vit_quickstart.py --workdir runs/vit
Expected: 98 % of the held-out digits named (98.1 and 98.9 % with seeds 0 and 1), after
about 65 seconds of processor time on a CPU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The quickstart of images."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "vit"
    config.model.layers = "attention"
    config.model.patch_size = 2
    config.model.num_layers = 4
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.pool = "mean"
    config.model.init_std = 0.1

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.augment = ConfigDict()
    config.data.augment.crop = "pad"
    config.data.augment.pad = 1
    config.data.augment.mixup = 0.2

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100

    config.train = ConfigDict()
    config.train.steps = 2500
    config.train.batch_size = 64
    config.train.steps_per_dispatch = 20
    config.train.log_every = 20
    config.train.save_every = 500

    config.eval = ConfigDict()
    config.eval.every = 500
    return config
