"""nanoGPT's character-level Shakespeare recipe for a CPU.

Paper: none; the recipe is nanoGPT's README (4 layers, 4 heads, width 128, context
64, batch 12, 2,000 steps, dropout 0), whose author reports a validation loss of
about 1.88.

Command: python -m attnjax.train --config configs/lm_shakespeare.py
  --config.data.data_dir=DATA_DIR --workdir runs/shakespeare
DATA_DIR holds the TensorFlow Datasets folder `tiny_shakespeare`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 4
    config.model.max_len = 64
    config.model.norm = "layer"
    config.model.norm_eps = 1e-5
    config.model.positions = "learned"
    config.model.activation = "gelu"
    config.model.use_bias = False
    config.model.tie_embeddings = True

    config.data = ConfigDict()
    config.data.name = "tfds:tiny_shakespeare"
    # nanoGPT holds out the last tenth, which TFDS cuts in two halves.
    config.data.eval_split = "validation+test"
    config.data.tokenizer = "chars"
    config.data.seq_len = 64
    config.data.packing = "windows"

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = 2000
    config.train.batch_size = 12
    config.train.log_every = 50
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 500
    config.eval.batch_size = 64
    return config
