"""launch/skypilot/train.yaml: known fields, and its shell parts run with fakes."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from attnjax.core.errors import EXIT_FAULT, EXIT_SAVED, EXIT_USER
from attnjax.training import hosts

jsonschema = pytest.importorskip("jsonschema")

TASK = Path(__file__).parents[2] / "launch" / "skypilot" / "train.yaml"
VARIABLE = {"type": ["string", "null"]}


def fields(**properties):
    return {"type": "object", "additionalProperties": False, "properties": properties}


# As in SkyPilot's "SkyPilot YAML" reference: what a task may say, of what we use.
SCHEMA = fields(
    name={"type": "string"},
    workdir={"type": "string"},
    num_nodes={"type": "integer", "minimum": 1},
    resources=fields(
        accelerators={"type": "string", "pattern": "^[A-Za-z0-9-]+:[0-9]+$"},
        job_recovery=fields(
            strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
            max_restarts_on_errors={"type": "integer", "minimum": 0},
            recover_on_exit_codes={
                "type": "array",
                # 137 is SkyPilot's own.
                "items": {"type": "integer", "maximum": 255, "not": {"const": 137}},
            },
        ),
    ),
    envs={
        "type": "object",
        "propertyNames": {"pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
        "additionalProperties": VARIABLE,
    },
    file_mounts={
        "type": "object",
        "additionalProperties": fields(
            name={"type": "string"},
            store={"enum": ["s3", "gcs", "azure", "r2", "oci", "ibm"]},
            mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
        ),
    },
    setup={"type": "string"},
    run={"type": "string"},
)
# Notes its start; ends with the next of its codes, "wait" being 75 at SIGTERM.
PYTHON = """#!/bin/bash
for word in "$@"; do printf '%q ' "$word" >>"$HOME/started"; done
echo "${JAX_COORDINATOR_ADDRESS-} ${JAX_NUM_PROCESSES-} ${JAX_PROCESS_ID-}" >>\
"$HOME/started"
[[ -s "$HOME/codes" ]] || exit 0
read -r code <"$HOME/codes"
sed -i 1d "$HOME/codes"
if [[ "$code" == wait ]]; then
    trap 'sleep 0.2; exit 75' TERM
    touch "$HOME/ready"
    for ((n = 0; n < 400; n++)); do sleep 0.05; done
fi
exit "$code"
"""


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load(TASK.read_text())


class Node:
    """A home with a fake Python, in which the shell parts of the task run."""

    def __init__(self, home, task):
        self.home = home
        self.task = task
        self.path = os.environ["PATH"]
        python = home / "attnjax-venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)

    def start(self, part="run", *, codes=(), nodes=1, rank=0, **variables):
        """A shell part of the task, with SkyPilot's variables."""
        (self.home / "codes").write_text("".join(f"{code}\n" for code in codes))
        given = {name: value for name, value in self.task["envs"].items() if value}
        environment = {
            "PATH": self.path,
            "HOME": str(self.home),
            **given,
            "TRAIN": "--config c.py",
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{n + 1}" for n in range(nodes)),
            **variables,
        }
        words = ["bash", "-c", self.task[part]]
        return subprocess.Popen(
            words, env=environment, cwd=self.home, stderr=subprocess.PIPE, text=True
        )

    def run(self, *words, **options):
        """Its exit code and what it said, once it has ended."""
        with self.start(*words, **options) as process:
            _, said = process.communicate(timeout=300)
        return process.returncode, said

    def starts(self):
        """Of each start of the training: its words, and the three JAX_ variables."""
        lines = (self.home / "started").read_text().splitlines()
        return [shlex.split(line) for line in lines]


@pytest.fixture
def node(tmp_path, task):
    return Node(tmp_path, task)


def test_task_has_fields_that_skypilot_knows(task):
    jsonschema.validate(task, SCHEMA)
    for place in (task, task["resources"], task["resources"]["job_recovery"]):
        place["recover"] = "always"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(task, SCHEMA)
        del place["recover"]


def test_saved_is_recovered_and_nothing_else_is(task):
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_SAVED]
    assert "max_restarts_on_errors" not in recovery


def test_run_directory_lies_in_the_bucket(task, node):
    assert task["envs"]["BUCKET"] is None and task["envs"]["TRAIN"] is None
    (place,) = task["file_mounts"]
    assert task["file_mounts"][place]["name"] == "${BUCKET}"
    assert node.run(RUN="big")[0] == 0
    words = node.starts()[0]
    assert words[words.index("--workdir") + 1] == f"{place}/big"


def test_words_of_train_are_read_as_a_shell_reads_them(node):
    (node.home / "--x=1").touch()
    train = "--config c.py:1 '--config.model.layers=(a*3 \"b\")*2' --x=*"
    assert node.run(TRAIN=train)[0] == 0
    module = ["-u", "-m", "attnjax.train", "--workdir", "/runs/first"]
    assert node.starts() == [[*module, *shlex.split(train)]]


def test_words_that_no_shell_reads_are_a_mistake(node):
    code, said = node.run(TRAIN="--config 'c.py")
    assert code == EXIT_USER and "unexpected EOF" in said
    assert not (node.home / "started").exists()


def test_one_node_is_one_process(node):
    node.run()
    assert node.starts()[0][-1] == "c.py"


def test_processes_of_several_nodes_find_each_other(node):
    assert node.run(nodes=3, rank=2)[0] == 0
    names = (hosts.COORDINATOR, hosts.NUM_PROCESSES, hosts.PROCESS_ID)
    found = dict(zip(names, node.starts()[0][-3:], strict=True))
    place = hosts.find(found)
    assert (place.coordinator, place.count, place.index) == ("10.0.0.1:8476", 3, 2)


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [
        ([0], 0, 1),
        ([EXIT_USER, 0], EXIT_USER, 1),
        ([EXIT_SAVED] * 5 + [0], 0, 6),
        ([EXIT_FAULT, EXIT_SAVED, 137, 0], 0, 4),
        ([EXIT_FAULT, EXIT_SAVED, EXIT_FAULT, 134, 0], 134, 4),
    ],
)
def test_exit_code_decides_whether_it_starts_again(node, codes, code, starts):
    ended, said = node.run(codes=codes, RETRIES="2")
    assert (ended, len(node.starts())) == (code, starts)
    assert ("RETRIES=2 reached" in said) == (code == 134)


def test_job_that_is_told_to_end_saves_and_is_recovered(node):
    with node.start(codes=["wait", 0]) as process:
        until = time.monotonic() + 300
        while not (node.home / "ready").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        # The shell alone: it passes the word on, and waits.
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    assert process.returncode == EXIT_SAVED
    assert len(node.starts()) == 1


def test_setup_installs_with_the_pins_and_the_extra(node):
    programs = node.home / "programs"
    programs.mkdir()
    uv = programs / "uv"
    uv.write_text('#!/bin/bash\necho "$*" >>"$HOME/uv"\n')
    uv.chmod(0o755)
    node.path = f"{programs}:{node.path}"
    assert node.run("setup", EXTRA="tpu")[0] == 0
    (installed,) = (node.home / "uv").read_text().splitlines()
    assert installed.endswith("-c constraints.txt -e .[tpu]")
    (node.home / "attnjax-venv/bin/python").unlink()
    assert node.run("setup")[0] == 0
    made, installed = (node.home / "uv").read_text().splitlines()[1:]
    assert made == f"venv --quiet --python 3.11 {node.home}/attnjax-venv"
    assert installed.endswith(".[cuda]")
    uv.write_text("#!/bin/bash\nexit 4\n")
    assert node.run("setup")[0] == 4
