"""GPT-2 small, 124,439,808 parameters, on OpenWebText as token files.

Paper: Language Models are Unsupervised Multitask Learners (Radford et al., 2019).
The recipe is nanoGPT's train_gpt2.py (0.5 M tokens a step), whose author reports a
validation loss of about 2.85 after about 4 days on 8 A100 of 40 GB.
No time and no loss of our own is claimed; `python -m attnjax.plan` gives bounds.

Command: python -m attnjax.train --config configs/lm/gpt2_124m.py
  --config.data.data_dir=DATA_DIR --workdir runs/gpt2_124m
DATA_DIR holds train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py writes
them.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = "attention"
    config.model.num_layers = 12
    config.model.embed_dim = 768
    config.model.num_heads = 12
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
    config.optim.learning_rate = 6e-4
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 2000
    config.optim.final_fraction = 0.1
    config.optim.beta2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = 600_000
    config.train.batch_size = 512
    config.train.log_every = 100
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.batches = 20
    return config
