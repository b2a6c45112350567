"""The dimension letters."""

from pathlib import Path

from attnjax.core.dims import DIMS, dims_table


def test_every_dimension_is_one_capital_letter():
    assert all(len(letter) == 1 and letter.isupper() for letter in DIMS)


def test_the_table_has_a_row_for_each_letter():
    rows = dims_table().splitlines()
    assert rows[0] == "| letter | meaning |"
    assert len(rows) == len(DIMS) + 2


def test_the_conventions_show_the_same_table():
    page = Path(__file__).parents[2] / "docs" / "conventions.md"
    assert dims_table() in page.read_text()
