import io
import sys
import time

from attnjax.data import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_takes_no_time_is_not_said(capsys):
    with progress.progress("reading") as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_long_work_is_said_in_plain_lines_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_QUIET", 0.05)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    with progress.progress("reading", total=9) as advance:
        time.sleep(0.3)
        advance(2)
        advance(5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["reading ...", "reading: 2 of 9", "reading: 7 of 9"]
    assert lines[3].startswith("reading: done, 0.")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("reading", total=9) as advance:
        advance(9)
    assert "reading" in terminal.getvalue() and "9/9" in terminal.getvalue()


def test_a_failure_leaves_no_line_behind(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_QUIET", 0.05)
    try:
        with progress.progress("reading"):
            raise KeyError("x")
    except KeyError:
        time.sleep(0.15)
    assert capsys.readouterr().err == ""
