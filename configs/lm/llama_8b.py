"""The shape of Llama 3 8B, 8,030,261,248 parameters.

Paper: The Llama 3 Herd of Models (arXiv 2407.21783, table 3: width, depth, heads,
MLP width, vocabulary, RoPE base and peak learning rate).
Differs: contexts of 4,096 tokens and 4 Mi tokens a step throughout, where the paper
raises both during the run; the data are yours. No time and no loss is claimed.

Command: python -m attnjax.train --config configs/lm/llama_8b.py
  --config.data.data_dir=DATA_DIR --workdir runs/llama_8b
DATA_DIR holds llm.c token files *train*.bin and *val*.bin of Llama 3's vocabulary.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 32
    config.model.embed_dim = 4096
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.mlp_dim = 14336
    config.model.max_len = 4096
    config.model.norm_eps = 1e-5
    config.model.rope = ConfigDict({"theta": 500_000.0})
    config.model.remat = "full"

    config.data = ConfigDict()
    config.data.name = "tokens:*.bin"
    config.data.tokenizer = "ids:128256"
    config.data.eot_token = 128001
    config.data.seq_len = 4096

    config.task = ConfigDict()
    # Tokens whose logits a device holds at one time.
    config.task.loss_chunk = 4096

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 8000
    config.optim.final_fraction = 0.01
    config.optim.beta2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = 1_200_000
    config.train.batch_size = 1024
    config.train.log_every = 100
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.batches = 20
    return config
