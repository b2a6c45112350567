import kill_matrix
import pytest
from kill_matrix import Kill, Result

pytestmark = pytest.mark.reliability


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    result = kill_matrix.kill_matrix(tmp_path, kills=5, per_run=5, spread=0)
    assert result.problems == []
    assert [kill.phase for kill in result.kills] == list(kill_matrix.DELAYS)


def test_the_table_counts_by_phase_and_shows_problems():
    kills = [Kill("r", "step", "step", 90, 70), Kill("r", "eval", "save", 30, -1)]
    page = kill_matrix.table(Result(kills, 1, 120.0, ["r: array x"]), command="c")
    assert "| save | 1 | 0 |" in page
    assert "| step | 1 | 1 |" in page
    assert "most steps lost by a kill: 30" in page
    assert "- Different: 1.\n  - r: array x" in page
