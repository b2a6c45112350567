"""`tfds:NAME[/CONFIG][:VERSION]`: TensorFlow Datasets, read without TensorFlow.

Reads data sets that are prepared in the array_record format. Preparing one needs
TensorFlow once (the extra `tfds-prepare`); reading needs `tensorflow-datasets` and
`array-record`. A folder that holds `dataset_info.json` can be given as
`data_dir` directly. Every example is a document, in the order of the files.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attnjax.core.errors import UserError, unknown
from attnjax.data.config import TextConfig
from attnjax.data.files import stats
from attnjax.data.source import SourceSpec, TextSource

SOURCE = SourceSpec(summary="TensorFlow Datasets (array_record)", argument="NAME")
_FORMAT = "array_record"
_GROUP = 256  # examples read at a time


@dataclasses.dataclass(frozen=True)
class Config(TextConfig):
    """Options of `tfds:NAME`.

    Attributes:
        data_dir: TFDS's folder, or the folder of one prepared version; None for
            TFDS's own default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
        train_split: TFDS split to train on, e.g. "train" or "train[:90%]".
        eval_split: TFDS split to hold out, e.g. "validation+test"; None takes
            "validation", or "test" where there is none.
        text_field: which feature is the text; None takes the only text feature, or
            the one named "text".
    """

    name: str = "tfds:tiny_shakespeare"
    train_split: str = "train"
    eval_split: str | None = None
    text_field: str | None = None


def open_source(config: Config) -> TextSource:
    """The data set's text.

    Raises:
        UserError: missing packages, a data set that is unknown, not prepared or in
            another format, an unknown split or field.
    """
    builder = prepared_builder(config.argument, config.data_dir)
    field = _text_field(builder, config)
    eval_split = config.eval_split or default_eval_split(builder, config.train_split)
    train = data_source(builder, config.train_split)
    held_out = data_source(builder, eval_split)
    refuse_overlap(builder, config.train_split, eval_split)
    folder = Path(builder.data_dir)
    label = builder.info.full_name.split("/")[0]
    facts = {
        "dataset": builder.info.full_name,
        "train_split": config.train_split,
        "eval_split": eval_split,
        "text_field": field,
    }
    return TextSource(
        label=label,
        identity={
            **facts,
            "files": stats(sorted(p for p in folder.iterdir() if p.is_file())),
        },
        train=_documents(train, field),
        eval=_documents(held_out, field),
        provenance=facts,
    )


def library() -> Any:
    """TFDS itself, imported when it is needed."""
    try:
        importlib.import_module("array_record")
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(
            "tfds: reading needs the packages tensorflow-datasets and array-record; "
            f"got {error}. Run: pip install tensorflow-datasets array-record"
        ) from error


def prepared_builder(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a data set that is on disk as array_record.

    Raises:
        UserError: no such data set, not prepared, or in another format.
    """
    tfds = library()
    given = str(Path(data_dir).expanduser()) if data_dir else None
    try:
        if given and Path(given, "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(given)
        else:
            # From the files alone: the code of the data set is not imported.
            files = tfds.core.read_only_builder
            builder = files.builder_from_files(name, data_dir=given)
    except tfds.core.registered.DatasetNotFoundError:
        raise _not_prepared(tfds, name, given) from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "tfds: a data set must have a name that TFDS understands and intact files; "
            f"got {name!r}: {_first_line(error)} Correct data.name, or prepare the "
            "data set again."
        ) from error
    found = builder.info.name
    wanted = name.split("/")[0].split(":")[0]
    if found != wanted:
        raise UserError(
            f"tfds: data_dir must hold the data set named; got {given} with {found!r}, "
            f"name='tfds:{name}'. Correct data.name or data.data_dir."
        )
    stored = getattr(builder.info.file_format, "value", None)
    if stored != _FORMAT:
        raise UserError(
            f"tfds: a data set must be prepared as {_FORMAT} to be read without "
            f"TensorFlow; got {name} as {stored}. {_how_to_prepare(name, given)}"
        )
    return builder


def described_builder(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a data set whose contents are known, prepared or not.

    What is not prepared is described by the code that TFDS has for it, as ImageNet is
    on a laptop that plans a run elsewhere; nothing can be read from such a builder.

    Raises:
        UserError: as `prepared_builder`, where TFDS has no such code.
    """
    try:
        return prepared_builder(name, data_dir)
    except UserError as not_prepared:
        try:
            return library().builder(name, try_gcs=False)
        except Exception:  # of the data set's code, which may be anything
            raise not_prepared from None


def data_source(builder: Any, split: str, decoders: Any = None) -> Any:
    """Random access to the examples of a TFDS split expression.

    Args:
        builder: from `prepared_builder`.
        split: e.g. "train[:90%]".
        decoders: TFDS's, by feature; None decodes everything.

    Raises:
        UserError: unknown or empty split.
    """
    known = list(builder.info.splits)
    try:
        source = builder.as_data_source(split=split, decoders=decoders)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            "tfds: a split must name examples of the data set (such as "
            f"'train[:90%]' or 'validation+test'); got {split!r}: "
            f"{_first_line(error)} Splits of {builder.info.name}: {', '.join(known)}."
        ) from error
    return source


def _not_prepared(tfds: Any, name: str, data_dir: str | None) -> UserError:
    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0].split(":")[0] not in known:
        where = Path(data_dir) if data_dir else Path(tfds.core.constants.DATA_DIR)
        local = [p.name for p in where.iterdir()] if where.is_dir() else []
        error = unknown("tfds", "data set", name, {*known, *local})
        return UserError(f"{error} Looked in {where}.")
    return UserError(
        f"tfds: the data set must be prepared once; got name='tfds:{name}', nothing in "
        f"{data_dir or tfds.core.constants.DATA_DIR}. {_how_to_prepare(name, data_dir)}"
    )


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    folder = f"data_dir={data_dir!r}, " if data_dir else ""
    return (
        "Run: pip install 'attnjax[tfds-prepare]' && python -c \"import "
        f"tensorflow_datasets as tfds; tfds.builder({name!r}, {folder}"
        f"file_format='{_FORMAT}').download_and_prepare()\""
    )


def _text_field(builder: Any, config: Config) -> str:
    features = builder.info.features
    names = [name for name, feature in features.items() if _is_text(feature)]
    if config.text_field is not None:
        if config.text_field not in names:
            raise unknown("tfds", "text_field", config.text_field, names)
        return config.text_field
    if len(names) == 1 or "text" in names:
        return "text" if "text" in names else names[0]
    if names:
        raise UserError(
            f"tfds: one feature must be the text; got {', '.join(sorted(names))} in "
            f"{builder.info.name}. Set data.text_field to one of them."
        )
    raise UserError(
        f"tfds: a text data set must have a text feature; got {builder.info.name} with "
        f"{', '.join(sorted(features))}. Use another data set."
    )


def _is_text(feature: Any) -> bool:
    """A string without a shape; labels are numbers, nested features are no text."""
    return feature.shape == () and feature.np_dtype in (object, str, bytes)


def default_eval_split(builder: Any, train_split: str) -> str:
    """What is held out where nothing is said: "validation", else "test".

    Raises:
        UserError: there is neither.
    """
    for name in ("validation", "test"):
        if name in builder.info.splits and name != train_split:
            return name
    raise UserError(
        "tfds: something must be held out; got a data set with splits "
        f"{', '.join(builder.info.splits)}. Set e.g. data.train_split='train[:95%]' "
        "and data.eval_split='train[95%:]'."
    )


def refuse_overlap(builder: Any, train_split: str, eval_split: str) -> None:
    """Raise `UserError` if two split expressions share examples."""

    def parts(split: str) -> list[tuple[str, int, int]]:
        return [
            (str(part.filename), part.skip, part.skip + part.take)
            for part in builder.info.splits[split].file_instructions
        ]

    for file, begin, end in parts(train_split):
        for other, start, stop in parts(eval_split):
            if file == other and begin < stop and start < end:
                raise UserError(
                    "tfds: examples must not be both trained on and held out; got "
                    f"train_split={train_split!r}, eval_split={eval_split!r}. Use "
                    "splits that do not overlap, e.g. 'train[:95%]' and 'train[95%:]'."
                )


def _documents(source: Any, field: str) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        for begin in range(0, len(source), _GROUP):
            indices = list(range(begin, min(begin + _GROUP, len(source))))
            for index, example in zip(
                indices, source.__getitems__(indices), strict=True
            ):
                yield _decode(example[field], index, field)

    return read


def _decode(value: Any, index: int, field: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"tfds: the text must be UTF-8; got field {field!r} of example {index}: "
            f"{error.reason} at byte {error.start}. Set data.text_field to another "
            "feature."
        ) from error


def _first_line(error: Exception) -> str:
    """The start of a message, as a sentence."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return text.rstrip(".") + "."
