"""From a folder with config.json and safetensors to a run directory."""

import dataclasses
import importlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnjax.conversion import rules, source, tensors
from attnjax.conversion.architectures import ARCHITECTURES
from attnjax.core.config import apply_overrides
from attnjax.core.dtypes import dtype_of
from attnjax.core.errors import UserError
from attnjax.data import tokenizers
from attnjax.training import disk, experiment, identity
from attnjax.training.checkpoints import Checkpointer
from attnjax.training.run_directory import RunDirectory

# What is kept of the folder, for the way back.
KEPT = "hf"
TENSORS = "tensors.json"
TOKENIZER = "tokenizer.json"
TEXTS = (
    source.CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SEQ_LEN = 1024  # of evaluation, at most


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        path: the run directory.
        architecture: its model_type.
        parameters: how many.
        tokenizer: "tokenizer.json", or "ids".
        left_out: tensors that hold nothing learned, or the same as another.
    """

    path: Path
    architecture: str
    parameters: int
    tokenizer: str
    left_out: tuple[str, ...]


def import_hf(
    folder: str | Path,
    workdir: str | Path,
    *,
    overrides: Sequence[tuple[str, str]] = (),
) -> Imported:
    """Make a run directory of a model folder; whole or not at all.

    Args:
        folder: config.json, *.safetensors and, where there is one, tokenizer.json.
        workdir: the run directory; must not exist, or be empty.
        overrides: (dotted key, text) changes to the run's config.

    Raises:
        UserError: for an architecture or a setting that attnjax does not have; a
            tensor that is missing, left over, of another shape or not a floating
            number; damaged files; a disk that is full.
    """
    folder, workdir = Path(folder), Path(workdir).absolute()
    theirs = source.read(folder)
    kind = architecture(theirs)
    files = tensors.Folder(folder)
    _require_new(workdir)
    tokenizer, settings = _tokenizer(folder, theirs, workdir)
    model = kind.model_config(theirs)
    given = {
        "model": model,
        "data": settings | {"seq_len": min(SEQ_LEN, model["max_len"])},
        "train": {"steps": 1, "sample_tokens": 0, "tensorboard": False},
    }
    config = experiment.resolve(apply_overrides(given, list(overrides)))
    model = experiment.build_model(config, {"vocab_size": tokenizer.vocab_size})
    reading = Reading(kind, files, model)
    params = rules.tree(
        model, reading.arrays(), dtype_of(config["model"]["param_dtype"])
    )
    _write(
        workdir,
        folder,
        theirs.model_type,
        config,
        model,
        params,
        tokenizer,
        reading.names(),
    )
    return Imported(
        workdir,
        theirs.model_type,
        model.parameter_count(),
        TOKENIZER if (folder / TOKENIZER).is_file() else "ids",
        reading.left_out,
    )


def architecture(theirs: source.Source):
    """The module of a config.json's model_type.

    Raises:
        UserError: for one that attnjax does not have.
    """
    return ARCHITECTURES.find(theirs.model_type, owner=f"--from hf: {source.CONFIG}")


class Reading:
    """One folder's tensors against what a model wants.

    Attributes:
        left_out: names that are not read.

    Raises:
        UserError: naming the tensor that is missing, left over, or other than wanted.
    """

    def __init__(self, kind, files: tensors.Folder, model):
        self._files = files
        self._rules = rules.rules(kind.ROWS, rules.wanted(model))
        present = files.names
        self._cut = len(kind.PREFIX)
        if any(name.startswith(kind.PREFIX) for name in present):
            self._cut = 0
        self._prefix = kind.PREFIX
        named = {self._name(rule) for rule in self._rules}
        extra = [name for name in present if name not in named]
        self.left_out = tuple(
            name
            for name in extra
            if any(re.fullmatch(pattern, name) for pattern in kind.CONSTANTS)
            or self._is_tied_head(name)
        )
        self._check(named, [name for name in extra if name not in self.left_out])

    def _name(self, rule: rules.Rule) -> str:
        """A rule's tensor as this folder calls it."""
        if rule.theirs.startswith(self._prefix):
            return rule.theirs[self._cut :]
        return rule.theirs

    def _is_tied_head(self, name: str) -> bool:
        """Whether a tensor is the token table once more."""
        if name != "lm_head.weight":
            return False
        table = next(r for r in self._rules if r.ours[0][0] == "token_embedding/table")
        have = self._files
        if self._name(table) not in have.names:
            return False
        one, other = have.read(name), have.read(self._name(table))
        if one.shape == other.shape and np.array_equal(one, other):
            return True
        raise UserError(
            f"--from hf: {name!r} must equal {self._name(table)!r}, as config.json "
            "says tie_word_embeddings; got other numbers. Set tie_word_embeddings to "
            "false in config.json."
        )

    def _check(self, named: set[str], extra: list[str]) -> None:
        present, where = set(self._files.names), str(self._files.path)
        missing = [r for r in self._rules if self._name(r) not in present]
        if missing:
            first, more = missing[0], _more(len(missing) - 1)
            raise UserError(
                f"--from hf: no tensor {self._name(first)!r} of shape "
                f"{list(first.shape)}, which config.json asks for{more}; got {where!r}."
            )
        if extra:
            raise UserError(
                f"--from hf: the model of config.json has no place for tensor "
                f"{extra[0]!r} of shape {list(self._files.shape(extra[0]))}"
                f"{_more(len(extra) - 1)}; got {where!r}."
            )
        for rule in self._rules:
            name = self._name(rule)
            shape, dtype = self._files.shape(name), self._files.dtype(name)
            if shape != rule.shape:
                raise UserError(
                    f"--from hf: tensor {name!r} must have shape {list(rule.shape)} "
                    f"by config.json; got {list(shape)}."
                )
            if dtype not in tensors.DTYPES:
                raise UserError(
                    f"--from hf: tensor {name!r} must be one of "
                    f"{', '.join(tensors.DTYPES)}; got {dtype}."
                )

    def arrays(self) -> dict[str, np.ndarray]:
        """Our arrays by absolute name."""
        found = {}
        for rule in self._rules:
            found |= rule.split(self._files.read(self._name(rule)))
        return found

    def names(self) -> dict[str, list[str]]:
        """Name of each tensor in the architecture's full form -> [its name in the
        files, its dtype]."""
        return {
            rule.theirs: [self._name(rule), self._files.dtype(self._name(rule))]
            for rule in self._rules
        }


def _more(count: int) -> str:
    return f" (and {count} more)" if count else ""


def _require_new(workdir: Path) -> None:
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(
            f"--workdir: must be new for a conversion; got {str(workdir)!r}, where "
            "something is already. Choose another, or remove it."
        )


def _tokenizer(folder: Path, theirs: source.Source, workdir: Path):
    """The tokenizer, and `config.data` that makes the same one."""
    size = theirs.size("vocab_size")
    ends = theirs.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    end = end if isinstance(end, int) and 0 <= end < size else None
    if not (folder / TOKENIZER).is_file():
        stored = {"type": "ids", "vocab_size": size, "separator": end}
        settings = {"name": "tokens:*.bin", "tokenizer": f"ids:{size}"}
        return tokenizers.tokenizer_from_json(stored), {**settings, "eot_token": end}
    build = tokenizers.base.Building
    name = f"json:{folder / TOKENIZER}"
    made = tokenizers.make_tokenizer(name, build())
    vocabulary = made.to_json()["tokenizer"]
    settings = {
        "eos_token": _end_text(folder, vocabulary, end),
        "bos_token": _start_text(folder / TOKENIZER),
    }
    made = tokenizers.make_tokenizer(name, build(**settings))
    kept = f"json:{workdir / KEPT / TOKENIZER}"
    return made, {"name": "stdlib", "tokenizer": kept, **settings}


def _start_text(file: Path) -> str | None:
    """The token that the vocabulary itself puts in front of every text, if any."""
    inner = importlib.import_module("tokenizers").Tokenizer.from_file(str(file))
    whole = inner.encode("a").ids
    bare = inner.encode("a", add_special_tokens=False).ids
    if len(whole) > len(bare) and whole[1 : 1 + len(bare)] == bare:
        return inner.id_to_token(whole[0])
    return None


def _end_text(folder: Path, vocabulary: dict, end: int | None) -> str | None:
    """The token that ends a text, as the folder says."""
    for entry in vocabulary.get("added_tokens") or ():
        if entry.get("id") == end:
            return entry.get("content")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    said = disk.read_json(file, owner="--from hf", cure="Copy it again.")
    token = said.get("eos_token") if isinstance(said, dict) else None
    return token.get("content") if isinstance(token, dict) else token


def _write(workdir, folder, model_type, config, model, params, tokenizer, names):
    """The run directory, built beside its place and then moved there."""
    building = workdir.with_name(workdir.name + ".converting")
    with disk.disk_errors("--workdir"):
        if building.exists():
            shutil.rmtree(building)
        workdir.parent.mkdir(parents=True, exist_ok=True)
    with RunDirectory.open(
        building,
        config,
        resolve=experiment.resolve,
        identity_excludes=identity.EXCLUDES,
    ) as run:
        run.converted({"from": "hf", "model_type": model_type})
        with disk.disk_errors("--workdir"):
            tokenizers.save_tokenizer(tokenizer, building / TOKENIZER)
            _keep(folder, building / KEPT, names)
        _, buffers = jax.eval_shape(model.init, 0)
        meta = {
            "step": 0,
            "pending_eval": False,
            "layout": model.layout.to_json(),
            "vocab_size": model.vocab_size,
        }
        with Checkpointer(building / "checkpoints") as checkpoints:
            checkpoints.save(0, {"params": params, "buffers": buffers}, meta)
    with disk.disk_errors("--workdir"):
        if workdir.exists():
            workdir.rmdir()
        os.rename(building, workdir)
        disk.sync(workdir.parent)


def _keep(folder: Path, kept: Path, names: dict[str, Any]) -> None:
    kept.mkdir()
    for name in TEXTS:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)
    disk.write_atomic(kept / TENSORS, json.dumps(names, indent=1) + "\n")
