"""`python -m edgekit`, and the `edgekit` script: the process around the command line."""

import faulthandler
import os
import sys
from io import TextIOWrapper
from pathlib import Path

from edgekit.common.interrupts import clean_up_on_sigterm, interrupts_end_the_process
from edgekit.supervisor import is_work, supervise


def main() -> None:
    """Run the command, in a process that may crash without a traceback or anything half-written.

    Ctrl-C while its modules are still being imported leaves no traceback, either.
    """
    with interrupts_end_the_process():
        if os.environ.get("EDGEKIT_TRACEBACK"):  # the crash itself is to be seen
            if sys.stderr is not None:
                faulthandler.enable()
        elif is_work(sys.argv[1:]):
            supervise()
        from edgekit.cli import main as command

        _repair_streams()
    clean_up_on_sigterm()
    command()


def _repair_streams() -> None:
    """Give libraries streams that they can write to, so that no finished work is lost by it.

    Python has None for a stream that the caller closed. Names that are not UTF-8, and terminals
    that are not, get escapes.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
