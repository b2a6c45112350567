"""Attentive probing: what the frozen layers of a trained run know of its classes.

Paper: Attention, Please! Revisiting Attentive Probing for Masked Image Modeling (arXiv
2506.10178). 32 queries pool the patches of a frozen encoder; batch norm and a linear
map read what they found. The authors train for 90 epochs with LARS. Here it is AdamW
without weight decay, and the linear map starts from the run's where that has the same
shape. No number is expected.

Command: python -m attnjax.train --config configs/vit/probe.py:RUN --workdir PROBE
Other data: --config.data.name=folder:PATH. A linear probe of the mean of the patches:
--config.model.pool=mean --config.model.pool_queries=none.
"""

from pathlib import Path
from typing import Any

from attnjax.core.errors import UserError
from attnjax.decoding.run import load_run


def get_config(run: str = "") -> dict[str, Any]:
    """A probe of RUN's newest checkpoint, on RUN's data."""
    if not run:
        raise UserError(
            "probe.py: needs the run to probe; got none. Write --config "
            "configs/vit/probe.py:RUN"
        )
    config = load_run(run).config
    name = config["model"]["name"]
    if name != "vit":
        raise UserError(
            f"probe.py: probes vision transformers; got a run with config.model.name="
            f"{name}."
        )
    return probe_of(config) | {"train": {"init_from": str(Path(run).absolute())}}


def probe_of(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a probe, of a run's resolved one, less `train`."""
    model = dict(config["model"])
    reads_it = model["pool"] == "class_token"
    model |= {
        "class_token": reads_it
        if model["class_token"] is None
        else model["class_token"],
        "pool": "attentive",
        "pool_queries": None,
        "head_norm": "batch",
        "head_hidden": None,
        "dropout": 0.0,
        "drop_path": 0.0,
    }
    optim = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "final_fraction": 0.0,
        "weight_decay": 0.0,
        "freeze": "^(?!pool/|head/)",
    }
    return {"model": model, "data": config["data"], "optim": optim}
