"""A byte-level Transformer on the text of Python itself.

Command: python -m attnjax.train --config configs/quickstart.py
  --workdir runs/quickstart
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The quickstart run."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 4
    config.model.embed_dim = 160
    config.model.num_heads = 5
    config.model.qk_norm = True
    config.model.tie_embeddings = True

    config.data = ConfigDict()
    config.data.name = "stdlib"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 256

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 4e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 40

    config.train = ConfigDict()
    config.train.steps = 360
    config.train.batch_size = 16
    config.train.log_every = 10
    config.train.save_every = 120

    config.eval = ConfigDict()
    config.eval.every = 180
    return config
