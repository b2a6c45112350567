"""Every file of the project parses and imports, and imports go one way."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "attnjax"
JAX_AND_ARRAYS = {"jax", "jaxlib", "numpy"}

# A room imports itself and what stands before it, with two exceptions: kernels
# knows nothing of ours, data knows core alone.
ORDER = [
    {"core", "kernels"},
    {"nn"},
    {"mixers"},
    {"models"},
    {"data"},
    {"tasks"},
    {"training"},
    {"decoding"},
    {"analysis", "planning", "conversion"},
    {"studies"},
    {"benchmarks", "conformance"},
]
ALONE = {"core": set(), "kernels": set(), "data": {"core"}}


def rooms_before(room):
    """The other rooms that `room` may import."""
    if room in ALONE:
        return ALONE[room]
    before = set()
    for level in ORDER:
        if room in level:
            return before
        before |= level
    raise AssertionError(f"attnjax/{room} has no place in the order of rooms")


def sources(*folders):
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """Dotted names that a file imports anywhere, inside functions too."""
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base, node.lineno
            if base == "attnjax":
                names = (f"attnjax.{alias.name}" for alias in node.names)
                yield from ((name, node.lineno) for name in names)


def room_of(module):
    """The room of a dotted name, or None for a front door or a foreign module."""
    parts = module.split(".")
    is_ours = parts[0] == "attnjax" and len(parts) > 1
    return parts[1] if is_ours and (PACKAGE / parts[1]).is_dir() else None


def breaches(path):
    """The imports of one file that go the wrong way, as text."""
    room = room_of(module_name(path))
    if room is None:
        return
    for module, line in imported_modules(path):
        if module == "attnjax":
            continue
        if module.startswith("attnjax.") and room_of(module) is None:
            yield f"{path}:{line}: {room} imports the front door {module}"
        elif room_of(module) not in {None, room, *rooms_before(room)}:
            yield f"{path}:{line}: {room} imports {module}"


def test_imports_go_one_way():
    assert [text for path in sources("attnjax") for text in breaches(path)] == []


def test_a_breach_of_the_order_is_seen(tmp_path, monkeypatch):
    fake = tmp_path / "attnjax"
    for room in ("core", "nn", "models"):
        (fake / room).mkdir(parents=True)
    path = fake / "nn" / "linear.py"
    path.write_text("def f():\n    from attnjax.models import lm\n    import jax\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", fake)
    assert [text.split(": ")[1] for text in breaches(path)] == [
        "nn imports attnjax.models"
    ]
    path.write_text("from attnjax import train\nfrom ..core import dims\n")
    assert [text.split(": ")[1] for text in breaches(path)] == [
        "nn imports the front door attnjax.train"
    ]


def test_every_room_has_a_place_in_the_order():
    for folder in PACKAGE.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            rooms_before(folder.name)


def test_kernels_import_jax_and_nothing_else_of_ours():
    allowed = JAX_AND_ARRAYS | set(sys.stdlib_module_names) | {"attnjax"}
    for path in sources("attnjax/kernels"):
        tops = {module.split(".")[0] for module, _ in imported_modules(path)}
        assert tops <= allowed, path


@pytest.mark.parametrize("path", sources("attnjax"), ids=module_name)
def test_every_module_imports_and_its_examples_run(path):
    module = importlib.import_module(module_name(path))
    assert module.__doc__, f"{path} has no docstring"
    if ">>>" in path.read_text(encoding="utf-8"):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    "path", sources("configs", "experiments", "launch"), ids=module_name
)
def test_every_script_parses_and_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_bytes(), str(path)))


@pytest.mark.parametrize(
    "path",
    [*sorted(ROOT.glob("launch/**/*.sh")), ROOT / ".ci" / "run"],
    ids=lambda p: p.name,
)
def test_every_shell_script_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=300)


@pytest.mark.parametrize("path", sources("attnjax"), ids=module_name)
def test_no_file_grows_beyond_reading(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 600, f"{path} has {lines} lines; split it by subject"
