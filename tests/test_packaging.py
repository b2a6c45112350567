"""What the package says it needs is what it needs."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import attnjax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {
    "orbax-checkpoint": "orbax",
    "tensorflow-datasets": "tensorflow_datasets",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
}
# tensorflow-datasets imports this and does not ask for it.
FOR_TFDS = {"importlib_resources"}
OPTIONAL = {
    "torch",
    "transformers",
    "wandb",
    "libtpu",
    "tensorflow",
    "diffusers",
    "safetensors",
    "tokamax",
}


def distribution(requirement):
    return re.match(r"[\w-]+", requirement)[0]


def direct_dependencies():
    return [distribution(line) for line in PROJECT["dependencies"]]


def imported_tops():
    """Top-level modules that the package imports anywhere."""
    tops = set()
    for path in (ROOT / "attnjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call):
                tops |= imported_by_call(node)
    return tops


def imported_by_call(node):
    """The module of importlib.import_module("name"), if `node` is one."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name == "import_module" and isinstance(node.args[0], ast.Constant):
        return {node.args[0].value.split(".")[0]}
    return set()


def test_direct_dependencies_stay_few():
    assert len(direct_dependencies()) <= 18


def test_every_dependency_is_used():
    used = imported_tops()
    for name in set(direct_dependencies()) - FOR_TFDS:
        assert MODULES.get(name, name) in used, f"{name} is imported nowhere"


def test_every_foreign_import_is_declared():
    declared = {MODULES.get(name, name) for name in direct_dependencies()}
    known = declared | OPTIONAL | set(sys.stdlib_module_names) | {"attnjax"}
    assert imported_tops() - known == set()


def test_contributing_says_why_each_dependency_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in direct_dependencies():
        assert re.search(rf"^- `{name}`: \w+", text, re.MULTILINE), name
    assert len(text.splitlines()) < 100


def test_every_dependency_is_pinned_by_the_constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    needed = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    for line in needed:
        assert distribution(line).lower().replace("_", "-") in pinned


def test_version_is_said_once():
    assert PROJECT["version"] == attnjax.__version__


def test_a_wheel_has_every_file_that_is_read_beside_the_code():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]["package-data"]["attnjax"]
    found = {path for pattern in patterns for path in (ROOT / "attnjax").glob(pattern)}
    kinds = {".py", ".pyc", ".md"}
    beside = {
        path
        for path in (ROOT / "attnjax").rglob("*")
        if path.is_file() and path.suffix not in kinds
    }
    assert beside
    assert beside <= found
