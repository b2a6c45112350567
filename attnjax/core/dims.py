"""The dimension letters: one letter, one meaning, in every docstring and einsum.

Einsum strings use the same letters in lower case.
"""

DIMS: dict[str, str] = {
    "B": "batch: sequences or images",
    "T": "queries: tokens of the sequence that asks",
    "S": "keys: tokens that are attended to (T in self-attention)",
    "H": "query heads",
    "K": "key/value heads",
    "G": "query heads of one key/value head, H / K",
    "D": "dimension of a query or key head",
    "E": "dimension of a value head",
    "C": "model (embedding) dimension",
    "M": "MLP dimension",
    "V": "vocabulary",
    "N": "chunks or blocks of a sequence",
    "L": "tokens of one chunk",
    "P": "patches",
}


def dims_table() -> str:
    """The letters as a Markdown table, for docs/conventions.md."""
    rows = [f"| {letter} | {meaning} |" for letter, meaning in DIMS.items()]
    return "\n".join(["| letter | meaning |", "|---|---|", *rows])
