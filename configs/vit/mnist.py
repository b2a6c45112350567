"""A small Vision Transformer on the 10,000 MNIST test images, cut into 64 patches.

Paper: none; sized so that one run takes one to two minutes of processor time. A study
changes the attention and leaves the rest.

Command: python -m attnjax.train --config configs/vit/mnist.py
  --config.data.data_dir=DATA_DIR --workdir runs/mnist
DATA_DIR holds the TensorFlow Datasets folder `mnist_t10k` (9,000 images to train on,
1,000 held out); without it TFDS's own $TFDS_DATA_DIR counts.
Expected: 97.9 % of the held-out images named (seed 0), after 104 seconds of processor
time on a CPU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "vit"
    config.model.layers = "attention"
    config.model.patch_size = 4
    config.model.num_layers = 4
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.pool = "mean"
    config.model.init_std = 0.1

    config.data = ConfigDict()
    config.data.name = "tfds:mnist_t10k"
    config.data.image_size = 32
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
    config.train.steps = 1200
    config.train.batch_size = 64
    config.train.steps_per_dispatch = 20
    config.train.log_every = 100
    config.train.save_every = None

    config.eval = ConfigDict()
    config.eval.every = 400
    return config
