import collections

import corruption_matrix
import pytest
from corruption_matrix import Result

pytestmark = pytest.mark.reliability


def test_every_damage_to_a_checkpoint_is_seen_and_survived(tmp_path):
    result = corruption_matrix.corruption_matrix(tmp_path, flips=10, starts=1)
    assert result.missed == []
    assert result.starts == 1
    assert sum(result.tried.values()) > 200
    assert len({name for name, _ in result.tried}) >= 6


def test_the_table_shows_what_was_missed():
    tried = collections.Counter({("meta.json", "truncated"): 3})
    page = corruption_matrix.table(Result(tried, ["meta.json: truncated"]), command="c")
    assert "2 of 3" in page
    assert "- Missed: meta.json: truncated" in page
