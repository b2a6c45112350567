import logging
import sys
import types

from attnjax.training.quiet import hush_storage


def test_late_reports_of_a_closed_loop_are_dropped_and_others_passed_on(monkeypatch):
    passed = []
    monkeypatch.setattr(sys, "unraisablehook", passed.append)
    hush_storage()
    hush_storage()
    late = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(exc_value=RuntimeError("something else"))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert passed == [other]


def test_only_orbaxs_own_log_lines_are_dropped():
    hush_storage()
    (mine,) = [f for f in logging.getLogger("absl").filters if "Orbax" in repr(type(f))]

    def record(path):
        return logging.LogRecord("absl", logging.ERROR, path, 1, "text", None, None)

    assert not mine.filter(record("/site-packages/orbax/checkpoint/x.py"))
    assert mine.filter(record("/site-packages/absl/app.py"))
