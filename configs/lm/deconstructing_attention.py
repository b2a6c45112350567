"""Deconstructed attention: a variant in all layers or in a hybrid, at four sizes.

Paper: Deconstructing Attention (Xue, Moosavi and Aletras, arXiv 2510.11602):
SlimPajama, 15 billion tokens (45 at 1.7B), sequences of 2,048, batches of 256, on a
vocabulary of 50k. At 500M the authors report a WikiText perplexity of 38.1 for standard
attention, 47.9 for approximate, 84.8 for rnd_emb_qk, 79.1 for fixed_seq_qk, 79.9 for
static_emb_qk and 993.5 for mlp in all layers, and of 38.5 to 45.8 in hybrids. No time
and no loss of our own is claimed; `python -m attnjax.plan` gives bounds.

Command: python -m attnjax.train
  --config configs/lm/deconstructing_attention.py:VARIANT,SCHEDULE,SIZE
  --config.data.data_dir=DATA_DIR --workdir runs/deconstructed
VARIANT is one of the mechanism's or "standard"; SCHEDULE even (the hybrid), odd, top,
middle, bottom, quarter, first, last, bilateral or uniform; SIZE 70m, 160m, 500m or
1.7b. DATA_DIR holds token shards (*.bin) with ids under 50,304. For fixed_seq_qk also
give --config.model.mixers.simple.sequence=ID,ID,... .
The skip evaluation of an even hybrid keeps every second layer:
  python -m attnjax.evaluate --workdir RUN --keep_layers=1,3,5,...
"""

from ml_collections import ConfigDict

from attnjax.core.errors import unknown
from attnjax.models.hybrids import hybrid

# Width, MLP width, layers, heads, billions of tokens, learning rate.
SIZES = {
    "70m": (512, 2048, 6, 8, 15, 4e-4),
    "160m": (768, 3072, 12, 12, 15, 4e-4),
    "500m": (896, 4864, 24, 14, 15, 4e-4),
    "1.7b": (2048, 6144, 28, 16, 45, 3e-4),
}
TOKENS = 256 * 2048  # A step.


def get_config(args: str = "non_approximate,even,70m") -> ConfigDict:
    """The recipe of "VARIANT,SCHEDULE,SIZE"; what is left out is the default's."""
    default = ("non_approximate", "even", "70m")
    given = args.split(",")
    variant, schedule, size = (*given, *default[len(given) :])
    if size not in SIZES:
        raise unknown("deconstructing_attention.py", "size", size, SIZES)
    width, mlp_dim, num_layers, num_heads, billions, rate = SIZES[size]
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = hybrid(schedule, num_layers, simple="simple")
    config.model.num_layers = None
    config.model.embed_dim = width
    config.model.mlp_dim = mlp_dim
    config.model.num_heads = num_heads
    config.model.max_len = 2048
    # The largest size follows Qwen3, the others Qwen2.5.
    config.model.qk_norm = size == "1.7b"
    config.model.mixers = ConfigDict()
    config.model.mixers.simple = ConfigDict(
        {"type": "deconstructing_attention", "variant": variant}
    )

    config.data = ConfigDict()
    config.data.name = "tokens:*.bin"
    config.data.tokenizer = "ids:50304"
    config.data.seq_len = 2048
    config.data.packing = "windows"

    config.optim = ConfigDict()
    config.optim.name = "adamw"
    config.optim.learning_rate = rate
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 2000
    # As printed; the usual value is 0.999.
    config.optim.beta2 = 0.9999
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train = ConfigDict()
    config.train.steps = billions * 10**9 // TOKENS
    config.train.batch_size = 256
    config.train.log_every = 100
    config.train.save_every = 1000

    config.eval = ConfigDict()
    config.eval.every = 1000
    config.eval.batches = 20
    return config
