"""The run that another one starts from: its model and its arrays."""

import json
from pathlib import Path

from attnjax.core.errors import UserError
from attnjax.models import conversions
from attnjax.models.layout import Layout
from attnjax.training import experiment as experiments
from attnjax.training import transfer
from attnjax.training.checkpoint_reader import CheckpointReader
from attnjax.training.run_directory import CONFIG


def read_arrays(reader: CheckpointReader, path: str) -> tuple[dict, dict]:
    """{absolute name: numpy array} of the newest intact checkpoint, averaged parameters
    where it has them, and its meta.

    Raises:
        UserError: when there is none.
    """
    found = reader.latest()
    if found is None:
        raise UserError(
            f"config.train.init_from: {path!r} holds no checkpoint. Name a run that "
            "has saved one."
        )
    other, meta = reader.restore_numpy(found.step)
    layout = Layout.from_json(meta["layout"])
    return transfer.all_named(other.get("ema", other["params"]), layout), meta


def read_model(path: str, meta: dict):
    """The model of a run directory with a checkpoint of this meta."""
    config = experiments.resolve(json.loads((Path(path) / CONFIG).read_text()))
    return experiments.build_model(config, meta)


def completed(config: dict, workdir: str | Path | None = None) -> dict:
    """A resolved config with what `train.init_convert` works out from the other run:
    the same for the same checkpoint. What `workdir` holds has been completed.

    Raises:
        UserError: when the other run is none, or does not fit.
    """
    train = config["train"]
    if train["init_convert"] is None:
        return config
    path = train["init_from"]
    if not hasattr(conversions.find(train["init_convert"]), "plan"):
        return config
    own = None if workdir is None else Path(workdir) / CONFIG
    if own is not None and own.is_file() and json.loads(own.read_text()) == config:
        return config
    if not (Path(path) / CONFIG).is_file():
        raise UserError(
            f"config.train.init_from: {path!r} is not a run directory (it has no "
            f"{CONFIG})."
        )
    reader = CheckpointReader(Path(path) / "checkpoints")
    arrays, meta = read_arrays(reader, path)
    model = conversions.planned(
        train["init_convert"],
        train["init_options"],
        config["model"],
        arrays,
        read_model(path, meta),
        layers=train["init_layers"],
    )
    return experiments.resolve(config | {"model": model})
