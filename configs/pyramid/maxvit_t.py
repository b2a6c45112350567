"""MaxViT-T on ImageNet-1k: convolutions, blocks and lattices in four stages.

Paper: MaxViT: Multi-Axis Vision Transformer (Tu et al., arXiv 2204.01697). The authors
report 83.62 % top-1 of T at 224 pixels after 300 epochs, 84.45 of S, 84.95 of B and
85.17 of L. The models here have the parameters of theirs (30,916,528 of T). No time and
no accuracy of our own is claimed.

Command: python -m attnjax.train --config configs/pyramid/maxvit_t.py[:SIZE]
  --config.data.data_dir=DATA_DIR --workdir runs/maxvit_t
SIZE is T, S, B or L. DATA_DIR holds imagenet2012 as TensorFlow Datasets prepares it
(array_record). Other mechanisms in the same places: --config.model.layers="NAME NAME".

What differs from the paper: drop-path grows over layers (a block is two), RandAugment
has magnitude 10, its largest here (theirs: 15), and the whole validation set is held
out.
"""

from ml_collections import ConfigDict

IMAGES = 1_268_355  # 99 % of the training images.
BATCH = 4096
EPOCHS = 300

# Size -> channels of the stem and of the first stage, blocks of each stage, drop-path.
SIZES = {
    "T": (64, 64, (2, 2, 5, 2), 0.2),
    "S": (64, 96, (2, 2, 5, 2), 0.3),
    "B": (64, 96, (2, 6, 14, 2), 0.4),
    "L": (128, 128, (2, 6, 14, 2), 0.6),
}


def get_config(size: str = "T") -> ConfigDict:
    """The recipe of a size."""
    stem_dim, dim, blocks, drop_path = SIZES[size]
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.name = "pyramid"
    config.model.stem = "double"
    config.model.stem_dim = stem_dim
    config.model.downsampling = "mbconv"
    config.model.mbconv = {"every": 2}
    config.model.layers = "block grid"
    config.model.mixers = {
        "block": {"type": "maxvit", "parts": "block", "window": 7},
        "grid": {"type": "maxvit", "parts": "grid", "window": 7},
    }
    config.model.depths = tuple(2 * count for count in blocks)
    config.model.embed_dim = dim
    config.model.num_heads = dim // 32
    config.model.activation = "gelu_tanh"
    config.model.norm_eps = 1e-5
    config.model.drop_path = drop_path
    config.model.head_hidden = 8 * dim

    config.data = ConfigDict()
    config.data.name = "tfds:imagenet2012"
    config.data.image_size = 224
    config.data.channels = 3
    config.data.train_split = "train[:99%]"
    config.data.eval_split = "validation"
    config.data.eval_crop = 0.875
    config.data.mean = (0.5,)
    config.data.std = (0.5,)
    config.data.augment = ConfigDict()
    config.data.augment.crop = "inception"
    config.data.augment.flip = True
    config.data.augment.randaugment_layers = 2
    config.data.augment.randaugment_magnitude = 10.0
    config.data.augment.mixup = 0.8

    config.task = ConfigDict()
    config.task.label_smoothing = 0.1

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10_000
    config.optim.final_fraction = 0.0
    config.optim.beta2 = 0.999
    config.optim.weight_decay = 0.05
    config.optim.decay_pattern = "kernel$"
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = EPOCHS * IMAGES // BATCH
    config.train.batch_size = BATCH
    config.train.log_every = 50
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 2500
    return config
