import json

import pytest

from attnjax.core.errors import UserError
from attnjax.studies import Table, sweep_file
from attnjax.training import identity
from attnjax.training.run_directory import RunDirectory

SEEDS = "def sweep():\n    return seeds(BASE, {})\n"


@pytest.fixture
def load(sweep_of, tmp_path):
    return lambda body: sweep_file.load(sweep_of(body), tmp_path / "work")


def test_a_point_is_named_by_the_identity_of_its_run(load, tmp_path):
    for point in load(SEEDS.format(2)).points:
        run = RunDirectory.open(
            tmp_path / point.hash,
            point.config,
            identity_excludes=identity.EXCLUDES,
        )
        run.close()
        assert run.manifest["config_hash"].startswith(point.hash)
        assert len(point.hash) >= 12


def test_a_changed_config_is_a_new_point_and_a_change_of_saving_is_not(load):
    def hashes(change):
        body = f"def sweep():\n    return seeds(point('config.py', {change}), 2)\n"
        return [point.hash for point in load(body).points]

    first = hashes({})
    assert len(set(first)) == 2
    assert hashes({"train.save_every": 7, "train.log_every": 1}) == first
    assert not set(hashes({"optim.learning_rate": 0.5})) & set(first)


def test_overrides_are_values_not_texts(load):
    body = (
        "def sweep():\n    return grid(BASE, {'optim.learning_rate': [0.1],"
        " 'model.layers': [['attention']], 'eval.every': {'never': None}})\n"
    )
    (point,) = load(body).points
    assert point.config["optim"]["learning_rate"] == 0.1
    assert point.config["model"]["layers"] == ["attention"]
    assert point.config["eval"]["every"] is None
    assert point.name == "learning_rate=0.1 layers=['attention'] every=never"


def test_what_is_written_is_what_the_report_reads(load, tmp_path):
    body = SEEDS.format(2) + "def table():\n    return Table(rows=('seed_',))\n"
    body = body.replace("seeds(BASE, 2)", "grid(seeds(BASE, 2), {'train.steps': [3]})")
    study = load(body.replace("seed_", "steps"))
    study.write()
    written = json.loads((tmp_path / "work" / "sweep.json").read_text())
    assert written["format"] == 1
    assert written["sweep"] == "sweep.py"
    assert len(written["sha256"]) == 64
    assert Table.from_json(written["table"]) == study.table
    assert [point["hash"] for point in written["points"]] == list(study.by_hash)
    assert written["points"][1] == {
        "hash": study.points[1].hash,
        "config": "config.py",
        "overrides": {"train.seed": 1, "train.steps": 3},
        "labels": {"seed": 1, "steps": 3},
    }
    for point in study.points:
        path = sweep_file.config_path(study.workdir, point.hash)
        assert json.loads(path.read_text()) == point.config


def test_points_that_are_not_asked_for_are_written_all_the_same(sweep_of, tmp_path):
    file = sweep_of(SEEDS.format(3))
    study = sweep_file.load(file, tmp_path / "work", only="seed=1")
    study.write()
    assert [one.labels["seed"] for one in study.asked] == [1]
    content = json.loads((tmp_path / "work/sweep.json").read_text())
    assert len(content["points"]) == len(study.points) == 3
    with pytest.raises(UserError, match="got seed=3"):
        sweep_file.load(file, tmp_path / "work", only="seed=3")


def test_loading_writes_nothing(load, tmp_path):
    load(SEEDS.format(1))
    assert not (tmp_path / "work").exists()


MISTAKES = {
    "no sweep()": ("x = 1\n", r"must define sweep\(\).*point, grid"),
    "not a list": ("def sweep():\n    return 3\n", r"must return a list.*got int"),
    "a list of something else": (
        "def sweep():\n    return [1]\n",
        r"must return a list.*got a list with a int",
    ),
    "no points": ("def sweep():\n    return []\n", r"gives no points"),
    "a fault in sweep()": (
        "def sweep():\n    return 1 / 0\n",
        r"sweep\.py:4: ZeroDivisionError: division by zero",
    ),
    "a syntax error": ("def sweep(:\n", r"sweep\.py:3: SyntaxError"),
    "a fault on import": ("import nothing_of_this_name\n", r"sweep\.py:3: ModuleNot"),
    "duplicate labels": (
        "def sweep():\n    return concat(point('config.py', a=1),"
        " point('config.py', {'train.steps': 9}, a=1))\n",
        r"labels must differ; points 0 and 1 both have a=1",
    ),
    "duplicate points": (
        "def sweep():\n    return concat(point('config.py', a=1),"
        " point('config.py', {'train.steps': 3}, a=2))\n",
        r"points must have different configs; a=1 and a=2 are the same run",
    ),
    "a wrong key": (
        "def sweep():\n    return grid(BASE, {'optim.lerning_rate': [1e-3]})\n",
        r"point 0 \(lerning_rate=0\.001\): config\.optim: unknown key 'lerning_rate'\. "
        r"Did you mean learning_rate\?",
    ),
    "a wrong value": (
        "def sweep():\n    return grid(seeds(BASE, 2), {'train.steps': [0]})\n",
        r"point 0 \(seed=0 steps=0\): config\.train\.steps: must be at least 1; got 0",
    ),
    "a mechanism that is not there": (
        "def sweep():\n    return grid(BASE, {'model.layers': ['gated_atention']})\n",
        r"point 0 \(layers=gated_atention\): .*Did you mean gated_attention or",
    ),
    "a config file that is not there": (
        "def sweep():\n    return point('konfig.py', a=1)\n",
        r"point 0 \(a=1\): --config: no file 'konfig\.py'",
    ),
    "a table that is none": (
        SEEDS.format(1) + "def table():\n    return {'rows': ['seed']}\n",
        r"table\(\) of .* must return an attnjax\.studies\.Table; got dict",
    ),
    "a baseline in no row": (
        "def sweep():\n    return grid(BASE, {'train.steps': [3, 4]})\n"
        "def table():\n    return Table(rows=('steps',), baseline={'steps': 5})\n",
        r"sweep\.py: Table: the baseline must be a row; got .*steps=5\..* Known: 3, 4",
    ),
    "a row that no point has": (
        "def sweep():\n    return grid(BASE, {'train.steps': [3, 4]})\n"
        "def table():\n    return Table(rows=('step',))\n",
        r"sweep\.py: Table: rows must name labels .*'step'\. Did you mean steps\?",
    ),
}


@pytest.mark.parametrize("body, text", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_file_is_one_line(load, body, text):
    with pytest.raises(UserError, match=text) as raised:
        load(body)
    assert "\n" not in str(raised.value)


def test_a_missing_or_unreadable_file_is_named(tmp_path, sweep_of):
    sweep_of(SEEDS.format(1))
    with pytest.raises(UserError, match=r"--sweep: no file .*Did you mean .*sweep\.py"):
        sweep_file.load(tmp_path / "sweeps.py", tmp_path / "work")
    with pytest.raises(UserError, match=r"--sweep: cannot read .*directory"):
        sweep_file.load(tmp_path, tmp_path / "work")


def test_points_that_train_together_have_another_worker(load):
    study = load("def sweep():\n    return seeds(BASE, 2, vectorize=True)\n")
    words = study.command(study.points[0])
    assert words[2] == "attnjax.studies.groups"
    assert words[-2:] == ["--vectorize", "always"]
    alone = load(SEEDS.format(2))
    assert alone.command(alone.points[0])[2] == "attnjax.studies.worker"


def test_points_that_cannot_train_together_are_refused(load):
    with pytest.raises(UserError, match=r"sweep\.py: vectorize: needs two points"):
        load("def sweep():\n    return seeds(BASE, 1, vectorize=True)\n")
