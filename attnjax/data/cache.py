"""Text is tokenised once; afterwards it is mapped from disk.

A cache is a folder named by the hash of what it was made from (source, tokenizer,
versions). It holds, for each split, `<split>.bin` (ids in the smallest unsigned
type, little-endian) and `<split>.offsets.bin` (int64), the tokenizer, and
`index.json`, written last, with sizes and a checksum of every block of every file.
What does not match is said and built again.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from attnjax.core.errors import UserError
from attnjax.data.config import TextConfig
from attnjax.data.corpus import Corpus, Split
from attnjax.data.folders import cache_root, disk_errors, new_folder, one_builder
from attnjax.data.progress import progress
from attnjax.data.source import TextSource
from attnjax.data.tokenizers.base import Building, Tokenizer, id_dtype
from attnjax.data.tokenizers.registry import (
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)

VERSION = 1  # of the layout on disk and of how documents become ids
INDEX = "index.json"
SPLITS = ("train", "eval")
_BLOCK = 1 << 22  # bytes under one checksum
_ALL_CHECKED = 1 << 29  # up to this many bytes every block is checked at opening
_SAMPLED = 32  # blocks checked of a larger file, evenly spaced
_GROUP = 1 << 20  # characters encoded at a time


class Damaged(Exception):
    """A cache that is not as it was written."""


def open_text(source: TextSource, config: TextConfig) -> Corpus:
    """The corpus of a text source, tokenised now or from the cache.

    Raises:
        UserError: an empty split, text the tokenizer cannot encode, or a cache
            folder that cannot be written.
    """
    key = _key(source, config)
    root = cache_root(config.cache_dir)
    path = root / f"{source.label}-{key[:20]}"
    try:
        return _open(path, source)
    except FileNotFoundError:
        pass
    except Damaged as damage:
        note = f"data: the cache {path} is damaged ({damage}); building it again"
        print(note, file=sys.stderr, flush=True)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with one_builder(path):
            try:  # another process may have built it while this one waited
                return _open(path, source)
            except (FileNotFoundError, Damaged):
                with new_folder(path) as folder:
                    _build(folder, source, config)
    return _open(path, source)


def _key(source: TextSource, config: TextConfig) -> str:
    facts = {
        "version": VERSION,
        "label": source.label,
        "source": source.identity,
        "tokenizer": tokenizer_identity(config.tokenizer),
        "eos_token": config.eos_token,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, source: TextSource, config: TextConfig) -> None:
    building = Building(train=source.train, eos_token=config.eos_token)
    tokenizer = make_tokenizer(config.tokenizer, building)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    digest = hashlib.sha256(tokenizer.fingerprint().encode())
    splits = {}
    for name in SPLITS:
        documents = getattr(source, name)()
        with progress(f"tokenising {source.label} ({name})") as advance:
            writer = _Writer(folder, name, tokenizer)
            for group in _groups(documents):
                writer.add(group)
                advance(len(group))
            splits[name] = writer.finish(digest)
        if not splits[name]["num_tokens"]:
            raise UserError(
                f"data: both splits must hold text; got no text in {name} of "
                f"{config.name}. Check the files, or hold out another share."
            )
    files = sorted(path.name for path in folder.iterdir())
    index = {
        "version": VERSION,
        "fingerprint": digest.hexdigest()[:32],
        "splits": splits,
        "files": {name: _checksums(folder / name) for name in files},
    }
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    """Non-empty documents, about `_GROUP` characters at a time."""
    group: list[str] = []
    size = 0
    for document in documents:
        if not document:
            continue
        group.append(document)
        size += len(document)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Writer:
    """Appends documents to a split's files and adds them to a digest."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._dtype = id_dtype(tokenizer.vocab_size).newbyteorder("<")
        self._lengths: list[int] = []
        self._num_bytes = 0
        self._hash = hashlib.sha256()
        self._offsets = folder / f"{name}.offsets.bin"
        self._ids = folder / f"{name}.bin"
        self._ids.touch()

    def add(self, documents: list[str]) -> None:
        """Encode documents, each followed by the separator if there is one."""
        end = self._tokenizer.separator
        tail = np.asarray([] if end is None else [end], self._dtype)
        encoded = self._tokenizer.encode_many(documents)
        with open(self._ids, "ab") as handle:
            for text, ids in zip(documents, encoded, strict=True):
                if not len(ids):
                    continue
                whole = np.concatenate([np.asarray(ids, self._dtype), tail])
                data = whole.tobytes()
                handle.write(data)
                self._hash.update(data)
                self._lengths.append(len(whole))
                self._num_bytes += len(text.encode("utf-8", "surrogateescape"))

    def finish(self, digest: Any) -> dict[str, Any]:
        """Write the offsets; what the index says of the split."""
        offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype("<i8")
        self._offsets.write_bytes(offsets.tobytes())
        digest.update(self._hash.digest() + offsets.tobytes())
        return {
            "num_tokens": int(offsets[-1]),
            "num_documents": len(self._lengths),
            "num_bytes": self._num_bytes,
            "dtype": self._dtype.str,
        }


def _checksums(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        blocks = iter(lambda: handle.read(_BLOCK), b"")
        sums = [zlib.crc32(block) for block in blocks]
    return {"bytes": path.stat().st_size, "crc32": sums}


def _open(path: Path, source: TextSource) -> Corpus:
    """Map a cache. FileNotFoundError: there is none. Damaged: it is not intact."""
    if not path.is_dir():
        raise FileNotFoundError(path)
    index = _read_index(path)
    for name, sums in index["files"].items():
        _verify(path / name, sums)
    try:
        tokenizer = load_tokenizer(path / "tokenizer.json")
    except UserError as error:
        raise Damaged(str(error)) from error
    splits = {name: _split(path, name, index, tokenizer) for name in SPLITS}
    provenance = {
        "source": source.label,
        "tokenizer": tokenizer.fingerprint(),
        **source.provenance,
        "splits": index["splits"],
    }
    return Corpus(
        train=splits["train"],
        eval=splits["eval"],
        tokenizer=tokenizer,
        fingerprint=index["fingerprint"],
        provenance=provenance,
    )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        checked = {key: index[key] for key in ("fingerprint", "splits", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{INDEX}: {error}") from error
    return checked


def _verify(path: Path, sums: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Damaged(str(error)) from error
    if size != sums["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes, not {sums['bytes']}")
    count = len(sums["crc32"])
    blocks = np.arange(count)
    if size > _ALL_CHECKED:
        blocks = np.unique(np.linspace(0, count - 1, _SAMPLED).astype(int))
    with open(path, "rb") as handle:
        for block in blocks.tolist():
            handle.seek(block * _BLOCK)
            if zlib.crc32(handle.read(_BLOCK)) != sums["crc32"][block]:
                raise Damaged(f"{path.name} differs from its checksum")


def _split(path: Path, name: str, index: dict, tokenizer: Tokenizer) -> Split:
    facts = index["splits"][name]
    return Split(
        tokens=_map(path / f"{name}.bin", facts["dtype"]),
        document_offsets=_map(path / f"{name}.offsets.bin", "<i8"),
        separator=tokenizer.separator,
        num_bytes=facts["num_bytes"],
        name=name,
    )


def _map(path: Path, dtype: str) -> np.ndarray:
    """A read-only map as a plain array, whose indexing is faster than memmap's."""
    return np.asarray(np.memmap(path, dtype, "r"))
