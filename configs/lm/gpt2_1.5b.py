"""GPT-2 XL, 1,557,611,200 parameters, on OpenWebText as token files.

Paper: Language Models are Unsupervised Multitask Learners (Radford et al., 2019).
Its training recipe was not published; the optimizer's settings are GPT-3's for 1.3 B
parameters (Brown et al., 2020, table 2.1: learning rate 2e-4, 1 M tokens a step).
No time and no loss of our own is claimed; `python -m attnjax.plan` gives bounds.

Command: python -m attnjax.train --config configs/lm/gpt2_1.5b.py
  --config.data.data_dir=DATA_DIR --workdir runs/gpt2_1_5b
DATA_DIR holds train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py writes
them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 48
    config.model.embed_dim = 1600
    config.model.num_heads = 25
    config.model.max_len = 1024
    config.model.norm = "layer"
    config.model.norm_eps = 1e-5
    config.model.positions = "learned"
    config.model.activation = "gelu"
    config.model.use_bias = True
    config.model.tie_embeddings = True

    config.data = ConfigDict()
    config.data.name = "tokens:*.bin"
    config.data.tokenizer = "ids:50257"
    config.data.eot_token = 50256
    config.data.seq_len = 1024
    config.data.packing = "windows"

    config.task = ConfigDict()
    # Tokens whose logits a device holds at one time.
    config.task.loss_chunk = 8192

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = 2e-4
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 2000
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = 600_000
    config.train.batch_size = 1024
    config.train.log_every = 100
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.batches = 20
    return config
