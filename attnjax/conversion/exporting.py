"""From a run directory to a folder with config.json and safetensors, or to one file."""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import attnjax
from attnjax.conversion import importing, plain, rules, source, tensors
from attnjax.conversion.architectures import ARCHITECTURES
from attnjax.core.errors import UserError
from attnjax.decoding.run import LoadedRun, load_run, read_config, require_text
from attnjax.models import lm
from attnjax.training import disk, transfer

# What config.json has besides the architecture's own settings.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        path: the folder or file.
        architecture: its model_type, or None for a file of our own arrays.
        files: what was written.
        has_tokenizer: whether tokenizer.json is among them.
    """

    path: Path
    architecture: str | None
    files: tuple[str, ...]
    has_tokenizer: bool


def export_hf(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Exported:
    """Write a run as a folder that transformers and what reads its files can load.

    Args:
        workdir: the run directory.
        out: the folder; must not exist, or be empty.
        step: the checkpoint; None takes the newest intact one.
        dtype: of all tensors; None leaves those of an imported run as they were, and
            takes config.model.param_dtype for others.
        shard_bytes: most bytes a file.

    Raises:
        UserError: when no architecture there computes what this model does.
    """
    out = Path(out)
    _require_new(out)
    require_text(read_config(Path(workdir)), "attnjax.convert")
    run = load_run(workdir, step=step)
    kept = Kept.of(run.path / importing.KEPT)
    model = _model(run)
    kind, config = kept.same(model) or express(model, kept)
    table = rules.rules(kind.ROWS, rules.wanted(run.model))
    arrays = transfer.all_named(run.params, run.model.layout)
    name_of, code_of = kept.naming(kind)
    code = tensors.NAMES[dtype] if dtype else None
    default = _default_code(run)
    by_name = {name_of(rule.theirs): rule for rule in table}
    codes = {name_of(r.theirs): code or code_of(r.theirs) or default for r in table}

    def make(name: str) -> np.ndarray:
        wide = by_name[name].join(arrays)
        return wide.astype(tensors.DTYPES[codes[name]])

    size = {
        name: rules.num_bytes(by_name[name].shape, tensors.DTYPES[codes[name]].itemsize)
        for name in sorted(by_name)
    }
    if code or not kept.values:
        config = config | {"dtype": _dtype_name(set(codes.values()))}
    building = out.with_name(out.name + ".converting")
    with disk.disk_errors("--out"):
        if building.exists():
            shutil.rmtree(building)
        building.mkdir(parents=True)
        files = tensors.write_folder(building, size, make, shard_bytes=shard_bytes)
        disk.write_atomic(building / source.CONFIG, json.dumps(config, indent=2) + "\n")
        files += [source.CONFIG, *_texts(building, run)]
        if out.exists():
            out.rmdir()
        os.rename(building, out)
        disk.sync(out.absolute().parent)
    return Exported(
        out, config["model_type"], tuple(files), importing.TOKENIZER in files
    )


def export_arrays(
    workdir: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write the arrays of any run as one safetensors file, by their absolute names.

    Args:
        out: the file; must not exist.
        dtype: of all arrays; None leaves them as they are stored.
    """
    out = Path(out)
    if out.exists():
        raise UserError(
            f"--out: must be a new file; got {str(out)!r}, which exists. Choose "
            "another, or remove it."
        )
    run = load_run(workdir, step=step)
    arrays = {
        name: np.asarray(value)
        for name, value in transfer.all_named(run.params, run.model.layout).items()
    }
    if dtype is not None:
        wanted = tensors.DTYPES[tensors.NAMES[dtype]]
        arrays = {name: array.astype(wanted) for name, array in arrays.items()}
    facts = {
        "format": "attnjax",
        "version": attnjax.__version__,
        "step": str(run.step),
        "config": json.dumps(run.config["model"]),
        "vocab_size": str(run.model.vocab_size),
    }
    building = out.with_name(out.name + ".tmp")
    with disk.disk_errors("--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        tensors.write_file(building, dict(sorted(arrays.items())), facts)
        os.replace(building, out)
    return Exported(out, None, (out.name,), False)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What an imported run keeps of the folder that it was made of.

    Attributes:
        values: its config.json; empty for other runs.
        names: name in the architecture's full form -> [its name there, its dtype].
    """

    values: dict[str, Any]
    names: dict[str, list[str]]

    @classmethod
    def of(cls, folder: Path) -> "Kept":
        """Read RUN/hf, which need not be there."""
        if not (folder / source.CONFIG).is_file():
            return cls({}, {})
        cure = "Restore it from a copy, or remove the folder to go without it."

        def read(name):
            return disk.read_json(folder / name, owner="--workdir", cure=cure)

        return cls(read(source.CONFIG), read(importing.TENSORS))

    def same(self, model: dict[str, Any]):
        """(architecture, config.json) where the run's model still is that model."""
        if not self.values:
            return None
        theirs = source.Source(self.values)
        kind = importing.architecture(theirs)
        if plain.differences(model, _read_back(kind, theirs)):
            return None
        return kind, self.values

    def naming(self, kind):
        """(name -> name to write, name -> dtype to write or None)."""
        names = self.names if self.values.get("model_type") == _type(kind) else {}

        def name_of(name: str) -> str:
            return names[name][0] if name in names else name

        def code_of(name: str) -> str | None:
            return names[name][1] if name in names else None

        return name_of, code_of


def _model(run: LoadedRun) -> dict[str, Any]:
    """The plain settings of a run's model."""
    return plain.plain(run.config["model"] | {"vocab_size": run.model.vocab_size})


def _read_back(kind, theirs: source.Source) -> dict[str, Any]:
    return plain.plain(lm.resolve(kind.model_config(theirs)))


def express(model: dict[str, Any], kept: Kept):
    """(architecture, config.json) that mean the same model.

    Args:
        model: its plain settings.
        kept: what the run keeps of another one, whose special tokens are taken over.

    Raises:
        UserError: when there is none, with what each lacks.
    """
    reasons = []
    for name in ARCHITECTURES.names():
        kind = ARCHITECTURES.find(name)
        try:
            values = {"model_type": name, **kind.hf_config(model)}
            lines = plain.differences(model, _read_back(kind, source.Source(values)))
            cost = len(lines)
        except UserError as error:
            lines, cost = [str(error)], math.inf
        if not lines:
            more = {k: v for k, v in kept.values.items() if k in TOKENS}
            return kind, {"architectures": [kind.CLASS], **values, **more}
        reasons.append((cost, name, lines))
    _, name, lines = min(reasons, key=lambda reason: reason[0])
    raise UserError(
        f"--to hf: no architecture there computes this model; {name} is nearest and "
        "differs (- this model, + there):\n"
        + "\n".join(f"  {line}" for line in lines[:8])
        + "\nUse --to safetensors, which takes any model."
    )


def _type(kind) -> str:
    return kind.__name__.rpartition(".")[2]


def _default_code(run: LoadedRun) -> str:
    stored = run.config["model"]["param_dtype"]
    if stored not in tensors.NAMES:
        raise UserError(
            f"--to hf: param_dtype={stored} is not written there. Choose --dtype "
            "float32, bfloat16 or float16."
        )
    return tensors.NAMES[stored]


def _dtype_name(codes: set[str]) -> str:
    """What config.json calls the dtype of all tensors, the widest of several."""
    for name in ("float32", "bfloat16", "float16"):
        if tensors.NAMES[name] in codes:
            return name
    raise ValueError(f"unknown dtypes {codes}")


def _texts(building: Path, run: LoadedRun) -> list[str]:
    """Write the tokenizer's files and what else was kept; their names."""
    written = []
    for name in importing.TEXTS:
        file = run.path / importing.KEPT / name
        if name != source.CONFIG and file.is_file():
            shutil.copyfile(file, building / name)
            written.append(name)
    stored = run.tokenizer.to_json()
    if importing.TOKENIZER not in written and stored["type"] == "json":
        text = json.dumps(stored["tokenizer"])
        disk.write_atomic(building / importing.TOKENIZER, text)
        written.append(importing.TOKENIZER)
    return written


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out: must be a new folder; got {str(out)!r}, where something is "
            "already. Choose another, or remove it."
        )
