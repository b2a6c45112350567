"""Byte-level BPE trained on the corpus.

Sennrich et al., "Neural machine translation of rare words with subword units",
arXiv 1508.07909, over the bytes of UTF-8 as in GPT-2: nothing is unknown, and
decoding gives the text back exactly. The result is a vocabulary of the `tokenizers`
library, stored and read like any other (`json:PATH`).
"""

from collections.abc import Iterator
from typing import Any

from attnjax.core.errors import UserError
from attnjax.data.progress import progress
from attnjax.data.tokenizers.base import Building, training_text
from attnjax.data.tokenizers.json import LibraryTokenizer, library

END = "<|endoftext|>"
SMALLEST = 257  # the bytes and the end of text


def identity(argument: str) -> dict[str, Any]:
    """Size and the library's version; the text is the source's to identify."""
    return {"size": _size(argument), "library": library().__version__}


def build(argument: str, building: Building) -> LibraryTokenizer:
    """`bpe:SIZE`, with id 0 for the end of a text.

    Raises:
        UserError: a size that is none, too small, or more than the text can fill.
    """
    size = _size(argument)
    parts = library()
    inner = parts.Tokenizer(parts.models.BPE())
    inner.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = parts.decoders.ByteLevel()
    trainer = parts.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=parts.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress(f"training {size} BPE tokens, characters read") as advance:
        text = training_text("bpe", building)
        inner.train_from_iterator(_counted(text, advance), trainer)
    found = inner.get_vocab_size()
    if found < size:
        raise UserError(
            f"data: the train split must be long enough for the vocabulary; got "
            f"tokenizer='bpe:{size}' and text for {found} tokens. Use bpe:{found}."
        )
    return LibraryTokenizer(inner, inner.token_to_id(END))


def _counted(texts: Iterator[str], advance) -> Iterator[str]:
    for text in texts:
        yield text
        advance(len(text))


def _size(argument: str) -> int:
    if not argument.isdecimal() or int(argument) < SMALLEST:
        raise UserError(
            f"data: a BPE vocabulary must have at least {SMALLEST} tokens (256 bytes "
            f"and the end of text); got tokenizer={'bpe:' + argument!r}. "
            "Write e.g. bpe:4096."
        )
    return int(argument)
