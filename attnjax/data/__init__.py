"""Data sets, tokenizers and batches: one file a source.

`attnjax.data.prefetch` moves batches to devices and is the room's only file that
imports jax.
"""

from typing import Any

from attnjax.data.batches import (
    batch,
    eval_batches,
    num_eval_batches,
    num_predicted,
    steps_per_epoch,
)
from attnjax.data.cache import open_text
from attnjax.data.corpus import Corpus, Split
from attnjax.data.source import TextSource, known_sources, source_module

__all__ = [
    "Corpus",
    "Split",
    "batch",
    "config_class",
    "eval_batches",
    "known_sources",
    "num_eval_batches",
    "num_predicted",
    "open_corpus",
    "steps_per_epoch",
]


def config_class(name: str) -> type:
    """The frozen dataclass of a source's options ("PREFIX" or "PREFIX:ARGUMENT").

    Raises:
        UserError: unknown source, or an argument missing or superfluous.
    """
    return source_module(name).Config


def open_corpus(config: Any) -> Corpus:
    """The data set that a source's config names, tokenised.

    The first call may take long and fills the cache; later ones map it.

    Raises:
        UserError: missing, unreadable or empty data, a tokenizer that does not fit
            it, or a cache folder that cannot be written.
    """
    opened = source_module(config.name).open_source(config)
    return open_text(opened, config) if isinstance(opened, TextSource) else opened
