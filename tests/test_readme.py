"""Every command and example of the README, run on tiny sizes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.startswith("python -m attnjax")
]
# What makes the quickstarts' models tiny; eight devices share the batch.
TINY = (
    "model.embed_dim=16 model.num_heads=2 model.num_layers={layers} data.seq_len=16 "
    "train.batch_size=8 train.steps=2 train.log_every=1 train.sample_tokens=0 "
    "train.tensorboard=false eval.batches=1 eval.every=none train.save_every=none"
)


# In place of a study's sweep: two points of two steps.
TINY_SWEEP = """
from attnjax.studies import Table, grid, point

SMALL = {small}


def sweep():
    base = point("{root}/configs/quickstart.py", SMALL)
    return grid(base, {{"model.layers": ["attention", "gated_attention"]}})


def table():
    return Table(rows=("layers",), baseline={{"layers": "attention"}})
"""


def run(command: str) -> int:
    """A README command in this process."""
    words = shlex.split(command)
    module = importlib.import_module(words[2])
    if words[2] == "attnjax.conformance":
        module = importlib.import_module("attnjax.conformance.__main__")
    return module.main(words[3:]) or 0


def tiny(command: str) -> str:
    """The command with small sizes, and the config file where it lies."""
    command = command.replace("configs/", f"{ROOT}/configs/")
    command = command.replace("train.steps=400", "train.steps=3")
    command = command.replace("experiments/smoke/sweep.py", "sweep.py")
    if "attnjax.generate --workdir runs/dit" in command:
        return f"{command} --num_steps 2"
    if "--judge" in command:
        return f"{command} --num_steps 2 --per_class 2"
    if "attnjax.train --config" not in command:
        return command
    layers = 4 if "*3" in command else 2
    changes = TINY.format(layers=layers).split()
    if "dit_quickstart" in command:
        changes.append("eval.draw.steps=1")
    if "vit_quickstart" in command or "dit_quickstart" in command:
        changes = [change for change in changes if "seq_len" not in change]
        changes.append("train.steps_per_dispatch=1")
    if "fsdp=4" in command:
        changes.append("mesh.data=1")
    return " ".join([command, *(f"--config.{change}" for change in changes)])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for runs/, with a tiny quickstart in it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pairs = [change.split("=") for change in TINY.format(layers=2).split()]
        words = {"true": True, "false": False, "none": None}
        small = {k: words[v] if v in words else int(v) for k, v in pairs}
        sweep = TINY_SWEEP.format(small=small, root=ROOT)
        (folder / "sweep.py").write_text(sweep)
        first = next(b for _, b in BLOCKS if "python3 -m venv" in b).strip()
        assert run(tiny(first.split(" && ")[-1])) == 0
        yield folder


def test_first_lines_set_everything_up_themselves():
    lines = [b.strip() for _, b in BLOCKS if "python3 -m venv" in b]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip ")
        assert "\n" not in line


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the workers of a sweep
    assert run(tiny(command)) == 0


def test_python_examples_run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {})
    assert "256" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in target:
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("page", "rows"),
    [("docs/planning/table.md", 22), ("experiments/smoke/table.md", 4)],
)
def test_tables_are_those_of_their_pages(page, rows):
    lines = (ROOT / page).read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == rows
    assert "\n".join(table) in TEXT
