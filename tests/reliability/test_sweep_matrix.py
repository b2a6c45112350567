import pytest
import sweep_matrix
from sweep_matrix import Result

pytestmark = pytest.mark.reliability


def test_a_disturbed_sweep_ends_in_the_table_of_an_undisturbed_one(tmp_path):
    result = sweep_matrix.sweep_matrix(tmp_path, points=6, seed=1)
    assert result.problems == []
    assert result.crashed == 1
    assert result.rows > 2
    assert result.begun[2] < 6


def test_the_page_counts_and_shows_problems():
    result = Result(6, 1, [2, 4], [3, 2, 2], 9, 60.0, ["abc: not done"])
    page = sweep_matrix.table(result, command="c")
    assert "| points begun by the three invocations | 3, 2, 2 |" in page
    assert "was killed (SIGKILL) | 2 and 4 |" in page
    assert "| **problems** | **1** |" in page
    assert "  - abc: not done" in page
