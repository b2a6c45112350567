"""No option is accepted and then ignored: every config field is read somewhere."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def is_config(node):
    """Whether a class holds options: a dataclass called Config, ...Config or Flags."""
    if not isinstance(node, ast.ClassDef):
        return False
    if not node.name.endswith(("Config", "Flags")):
        return False
    return any("dataclass" in ast.unparse(item) for item in node.decorator_list)


def options():
    """(file, class, field) of every option in the package."""
    for path in sorted((ROOT / "attnjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if is_config(node):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign):
                        yield path.relative_to(ROOT), node.name, item.target.id


def names_read():
    """Every name that the package reads as an attribute or spells as a text."""
    names = set()
    for path in (ROOT / "attnjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


READ = names_read()


@pytest.mark.parametrize(
    ("path", "owner", "field"), list(options()), ids=lambda part: str(part)
)
def test_every_option_is_read(path, owner, field):
    assert field in READ, f"{path}: {owner}.{field} is read nowhere"
