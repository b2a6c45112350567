"""Compiling for accelerators that are not there: pytest -m aot (extra `aot`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnjax.planning import targets

ROOT = Path(__file__).parents[2]
TINY = [
    "--config.model.num_layers=2",
    "--config.model.embed_dim=64",
    "--config.model.num_heads=2",
    "--config.data.seq_len=64",
]


def _plan(target, *more):
    lacking = targets.missing_extra(targets.parse(target).platform)
    if lacking is not None:
        pytest.skip(lacking)
    command = [sys.executable, "-m", "attnjax.plan", "--target", target, "--json"]
    command += ["--config", "configs/quickstart.py", *TINY, *more]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "kind", "mesh"),
    [
        ("h200:16", "NVIDIA H200", "--config.mesh.fsdp=2"),
        ("v5e:2x4", "TPU v5 lite", "--config.mesh.fsdp=4"),
    ],
)
def test_step_and_decode_step_compile(target, kind, mesh):
    found = _plan(target, mesh)
    assert found["device_kind"] == kind
    for name in ("train", "decode"):
        assert found[name]["error"] is None
        assert found[name]["fits"] is True
    train = found["train"]
    assert {c["kind"] for c in train["collectives"]} & {"all-reduce", "reduce-scatter"}
    assert train["flops"] > 0
    assert train["estimate"]["step"] > 0
    assert 0 < train["estimate"]["mfu"] <= 1


@pytest.mark.aot
def test_cudnn_is_replaced_and_told():
    found = _plan(
        "h200:1", "--config.data.packing=windows", "--config.train.batch_size=4",
        "--decode=false",
    )  # fmt: skip
    (choice,) = found["train"]["attention"]
    assert (choice["wanted"], choice["used"]) == ("cudnn", "blocked")
    assert "cannot be compiled without" in choice["reason"]


@pytest.mark.aot
def test_what_does_not_fit_says_by_how_much():
    found = _plan(
        "v5e:1x1", "--config.train.batch_size=4096", "--config.model.remat=none",
        "--config.data.seq_len=1024", "--decode=false",
    )  # fmt: skip
    train = found["train"]
    assert train["fits"] is False
    assert train["bytes_per_device"]["spare"] < 0
