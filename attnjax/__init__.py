"""attnjax: attention mechanisms as config diffs, in JAX and Flax NNX."""

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def load(workdir: str, *, step: int | None = None):
    """Open a finished or unfinished run for work in a notebook.

    Args:
        workdir: a run directory written by `python -m attnjax.train`.
        step: the checkpoint to read; None takes the newest intact one.

    Returns:
        A `decoding.run.LoadedRun` with the config, the model, its parameters,
        the tokenizer, and `logits` and `generate` methods; for a classifier of
        images a `LoadedClassifier` with its class names, `logits` and `name`.
    """
    from attnjax.decoding.run import load_run

    return load_run(workdir, step=step)
