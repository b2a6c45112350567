"""The small language model of the studies: characters of Shakespeare, four layers.

Paper: none; sized so that one run takes about a minute on two cores. A study changes
the attention and leaves the rest: the same text, order of data, optimizer and steps.

Command: python -m attnjax.train --config configs/lm_study.py
  --config.data.data_dir=DATA_DIR --workdir runs/study
DATA_DIR holds the TensorFlow Datasets folder `tiny_shakespeare`; without it TFDS's own
$TFDS_DATA_DIR counts.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 8
    config.model.num_kv_heads = 4
    config.model.mlp_dim = 352
    config.model.max_len = 128
    config.model.tie_embeddings = True

    config.data = ConfigDict()
    config.data.name = "tfds:tiny_shakespeare"
    config.data.eval_split = "validation+test"
    config.data.tokenizer = "chars"
    config.data.seq_len = 128
    config.data.packing = "windows"

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 50
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    # 0.8 million characters: less than one pass over the text.
    config.train.steps = 400
    config.train.batch_size = 16
    # One dispatch of 20 steps is 1.4 times as fast on two cores as 20 of one.
    config.train.steps_per_dispatch = 20
    config.train.log_every = 20
    config.train.save_every = 200
    config.train.tensorboard = False
    config.train.sample_tokens = 0

    config.eval = ConfigDict()
    config.eval.every = 200
    config.eval.batch_size = 32
    config.eval.batches = 20
    return config
