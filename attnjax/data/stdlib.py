"""`stdlib`: the text of Python itself, present wherever this project runs.

Documents are the library's source files of the running interpreter and the topics
of its language reference (`pydoc_data.topics`): real code and real English, about
9 MB. The text differs a little between Python versions, so the fingerprint and the
version are part of a run's record; compare results on one version.

About 5 % of the documents are held out, by a hash of their relative name, so
the choice depends neither on the order of files nor on their number.
"""

import dataclasses
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from attnjax.core.errors import UserError
from attnjax.data.config import TextConfig
from attnjax.data.source import SourceSpec, TextSource

SOURCE = SourceSpec(summary="Python's own library source and language reference")

HELD_OUT = 0.05  # share of the documents, by hash

# Installed packages, tests, and files that are tables or depend on the machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
_SKIPPED_FOLDERS |= {"idle_test", "encodings", "pydoc_data", "__pycache__"}
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of `stdlib`: those of every text source.

    Attributes:
        data_dir: a library folder to read instead of the running interpreter's.
    """


def open_source(config: Config) -> TextSource:
    """The library's text, split by document.

    Raises:
        UserError: the interpreter has no library source files.
    """
    root = Path(config.data_dir or sysconfig.get_path("stdlib"))
    names = sorted(_files(root))
    if not names:
        raise UserError(
            f"stdlib: the library folder must hold .py files; got none in {root}. "
            "Set data.data_dir to the source of a Python library, or use text:GLOB."
        )
    stats = [(root / name).stat() for name in names]

    def documents(held_out: bool) -> Iterator[str]:
        for name in names:
            if is_held_out(name) == held_out:
                yield from _read(root / name)
        for topic, text in sorted(_topics().items()):
            if is_held_out(f"topics/{topic}") == held_out:
                yield text

    return TextSource(
        label="stdlib",
        identity={
            "root": str(root),
            "python": platform.python_version(),
            "files": [
                [name, stat.st_size, stat.st_mtime_ns]
                for name, stat in zip(names, stats, strict=True)
            ],
            "held_out": HELD_OUT,
        },
        train=lambda: documents(False),
        eval=lambda: documents(True),
        provenance={"python_version": platform.python_version()},
    )


def is_held_out(name: str) -> bool:
    """Whether a document, named by its path inside the library, is held out."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py") and not file.startswith(_SKIPPED_FILES):
                yield Path(folder, file).relative_to(root).as_posix()


def _read(path: Path) -> Iterator[str]:
    """The file's text, or nothing where it is of an older encoding."""
    try:
        yield path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "stdlib: this Python must have the module pydoc_data.topics (the language "
            f"reference); got {error}. Install the full Python library, or use "
            "text:GLOB."
        ) from error
    return topics
