"""Text to ids and back: one file per kind of tokenizer."""

from attnjax.data.tokenizers.base import Tokenizer
from attnjax.data.tokenizers.registry import (
    check_same_tokenizer,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tokenizer_from_json,
)

__all__ = [
    "Tokenizer",
    "check_same_tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "save_tokenizer",
    "tokenizer_from_json",
]
