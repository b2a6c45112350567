"""What of a config says which run it is."""

# What may differ between two starts of one run: it changes how fast or where the
# run goes and what is written on the way, not what is learned.
EXCLUDES = (
    "mesh",
    "data.cache_dir",
    "data.data_dir",
    "train.log_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep_last",
    "train.keep_best",
    "train.steps_per_dispatch",
    "train.tensorboard",
    "train.tracker",
    "train.profile_start",
    "train.profile_steps",
    "train.sample_tokens",
    "eval.draw",
)
