import pytest
import sigterm_matrix
from sigterm_matrix import Stop

pytestmark = pytest.mark.reliability


def test_a_request_to_stop_saves_in_every_phase(tmp_path):
    stops, differences = sigterm_matrix.sigterm_matrix(tmp_path, signals=5)
    assert [stop.problems for stop in stops] == [()] * 5
    assert [stop.code for stop in stops] == [75] * 5
    assert differences == []


def test_a_stop_that_is_not_as_promised_is_told():
    found = sigterm_matrix._problems("SIGTERM", -15, 9, "Traceback")
    assert found == (
        "exit code -15",
        "the signal was not announced",
        "nothing says how to go on",
        "a traceback",
        "9 more steps",
    )
    page = sigterm_matrix.table(
        [Stop("r", "step", "SIGTERM", -15, 1.0, 9, found)], ["r: x"], command="c"
    )
    assert "Saved and left with 75: 0 of 1" in page
    assert "different: 1" in page
