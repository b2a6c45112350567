"""python -m attnjax.conformance NAME|PATH|all [--case REGEX]: a table, exit 0 or 1."""

import dataclasses
import re

import jax

from attnjax.conformance.suite import Result, cases, run
from attnjax.core import discovery
from attnjax.core.cli import run_main
from attnjax.core.errors import UserError
from attnjax.core.flags import parse_command_line, positional


@dataclasses.dataclass(frozen=True)
class Flags:
    """Test a mechanism against the contract of every token mixer.

    Attributes:
        mechanism: a catalog name, the path of a file that defines one, or "all".
        case: a regular expression; only cases whose name it matches are run.
    """

    mechanism: str = positional()
    case: str = ""


def main(argv: list[str]) -> int:
    """Print one line a case; 1 if any failed."""
    flags = parse_command_line(
        argv, Flags, program="attnjax.conformance", config=False, overrides=False
    ).flags
    try:
        wanted = re.compile(flags.case)
    except re.error as error:
        raise UserError(
            f"--case: must be a regular expression; got {flags.case!r}: {error}."
        ) from None
    jax.config.update("jax_num_cpu_devices", 8)
    named = flags.mechanism
    names = discovery.names() if named == "all" else [named]
    failed = []
    for name in names:
        print(name, flush=True)
        report = run(name, only=lambda case: bool(wanted.search(case)), told=_say)
        if not report.results and named != "all":
            known = ", ".join(case.id for case in cases(discovery.find(name)))
            raise UserError(
                f"--case: matches no case of {report.name}; got {flags.case!r}. "
                f"Its cases: {known}."
            )
        print(str(report).splitlines()[-1], flush=True)
        failed += [] if report.passed else [report.name]
    if failed and len(names) > 1:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _say(result: Result) -> None:
    line = f"  {result.outcome:4}  {result.seconds:6.2f} s  {result.id}"
    print(f"{line}: {result.message}" if result.message else line, flush=True)


if __name__ == "__main__":
    run_main(main)
