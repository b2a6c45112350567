"""How front doors end: exit codes and what stands on stderr."""

import errno
import subprocess
import sys

import pytest

from attnjax.core.cli import run_main
from attnjax.core.errors import UserError


def end(main, capsys):
    """The exit code and stderr of a front door."""
    with pytest.raises(SystemExit) as ended:
        run_main(main, ["word"])
    return ended.value.code, capsys.readouterr().err


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (75, 75)])
def test_the_return_value_is_the_exit_code(given, code, capsys):
    assert end(lambda argv: given, capsys) == (code, "")


def test_main_gets_the_command_line():
    seen = []
    with pytest.raises(SystemExit):
        run_main(lambda argv: seen.extend(argv), ["a", "b"])
    assert seen == ["a", "b"]


def test_a_users_mistake_is_one_line_and_exit_2(capsys):
    assert end(raising(UserError("x: must; got 1.")), capsys) == (
        2,
        "error: x: must; got 1.\n",
    )


def test_a_fault_of_ours_shows_the_traceback_and_exit_1(capsys):
    code, text = end(raising(KeyError("gone")), capsys)
    assert code == 1
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("fault: KeyError inside attnjax")


def test_an_interrupt_is_one_line_and_exit_130(capsys):
    assert end(raising(KeyboardInterrupt()), capsys) == (130, "interrupted.\n")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_a_disk_that_cannot_be_written_is_the_users_to_mend(number, words, capsys):
    code, text = end(raising(OSError(number, "x", "/runs/a")), capsys)
    assert code == 2
    assert text.startswith("error: '/runs/a': ")
    assert words in text
    assert text.count("\n") == 1


def test_a_full_disk_is_found_behind_another_error(capsys):
    error = RuntimeError("save failed")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    assert end(raising(error), capsys)[0] == 2
    storage = ValueError("Error writing 'a/b': No space left on device [source ...]")
    assert end(raising(storage), capsys) == (
        2,
        "error: disk: no space left on the disk. Free some, or choose another "
        "--workdir.\n",
    )
    group = ExceptionGroup("all failed", [ValueError("x"), storage])
    assert end(raising(group), capsys)[0] == 2


def test_a_missing_file_of_ours_is_a_fault(capsys):
    assert end(raising(FileNotFoundError(errno.ENOENT, "x")), capsys)[0] == 1


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("for i in range(100000): print('line', i)", 0, ""),
        ("print('line'); sys.stdin.read()", 0, ""),
        ("print('line'); sys.stdin.read(); raise UserError('x')", 2, "error: x\n"),
    ],
    ids=["while printing", "before the last flush", "before a mistake is told"],
)
def test_a_closed_pipe_ends_quietly(body, code, said):
    program = (
        "import sys\n"
        "from attnjax.core.cli import run_main\n"
        "from attnjax.core.errors import UserError\n"
        "def main(argv):\n"
        f"    {body}\n"
        "run_main(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
        text=True,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == said
    assert process.wait(timeout=300) == code
