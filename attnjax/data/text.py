"""`text:GLOB`: text files, UTF-8.

Several files are one document each, and some of them are held out. A single file is
one long document whose end is held out, as nanoGPT does. `eval_files` names the
held-out files instead.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from attnjax.core.errors import UserError
from attnjax.data.config import TextConfig, check_fraction
from attnjax.data.files import base_folder, held_out_files, matching, stats
from attnjax.data.source import SourceSpec, TextSource

SOURCE = SourceSpec(summary="text files, one document each", argument="GLOB")


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of `text:GLOB`.

    Attributes:
        data_dir: what a relative GLOB starts from; None for the current folder.
        eval_fraction: share held out: of one file the last characters, of several
            whole files, in bytes. Not used with `eval_files`.
        eval_files: GLOB of the held-out files; they are never trained on.
    """

    name: str = "text:*.txt"
    eval_fraction: float = 0.1
    eval_files: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_fraction(self.eval_fraction)


def open_source(config: Config) -> TextSource:
    """The files' text.

    Raises:
        UserError: no match; while reading, a file that cannot be read or decoded.
    """
    paths = matching("text", config.argument, config.data_dir)
    if config.eval_files is not None:
        held_out = matching("text", config.eval_files, config.data_dir)
        train = sorted(set(paths) - set(held_out))
        if not train:
            raise UserError(
                "text: files to train on must remain beside eval_files; got "
                f"{len(paths)} files, all of them held out. Narrow data.eval_files."
            )
        readers = _whole(train), _whole(held_out)
    elif len(paths) > 1:
        held_out = sorted(held_out_files(paths, config.eval_fraction))
        train = sorted(set(paths) - set(held_out))
        readers = _whole(train), _whole(held_out)
    else:
        train, held_out = paths, []
        readers = _parts(paths[0], config.eval_fraction)
    used = sorted({*train, *held_out})
    return TextSource(
        label="text",
        identity={
            "files": stats(used),
            "held_out": [str(path.absolute()) for path in held_out],
            "eval_fraction": config.eval_fraction,
        },
        train=readers[0],
        eval=readers[1],
        provenance={
            "files": [
                path.absolute().relative_to(base_folder(used)).as_posix()
                for path in used[:100]
            ],
            "num_files": len(used),
        },
    )


Reader = Callable[[], Iterator[str]]


def _whole(paths: list[Path]) -> Reader:
    return lambda: (_text(path) for path in paths)


def _parts(path: Path, eval_fraction: float) -> tuple[Reader, Reader]:
    """One file, cut at a character."""

    def part(train: bool) -> Iterator[str]:
        text = _text(path)
        cut = int(len(text) * (1.0 - eval_fraction))
        yield text[:cut] if train else text[cut:]

    return lambda: part(True), lambda: part(False)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"text: files must be readable; got {path}: {error.strerror}. "
            "Check its permissions, or leave it out of the pattern."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"text: files must be UTF-8; got {path}: byte 0x{data[error.start]:02x} at "
            f"offset {error.start}. Convert it, e.g. iconv -f LATIN1 -t UTF-8, or "
            "leave it out of the pattern."
        ) from error
