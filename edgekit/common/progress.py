"""Progress of long work: how it is told, and how it is shown on stderr.

On a terminal, every stage has a line and steps rewrite one. Elsewhere, in a log, a line now and
then says that work goes on; work that is soon done says nothing.
"""

import sys
import time
from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with the stage that begins."""
Steps = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next or the figures so far)."""
SILENCE = 30.0
"""Seconds between lines where nobody looks."""


def somebody_looks() -> bool:
    """Whether stderr is a terminal; Python has None for it where the caller closed it."""
    return sys.stderr is not None and sys.stderr.isatty()


def no_steps(done: int, total: int, label: str) -> None:
    """Tell nobody."""


def stage_printer() -> Progress:
    """Return a function that prints a stage with the seconds since the start."""
    start = time.monotonic()
    log = Log()

    def show(stage: str) -> None:
        line = f"[{time.monotonic() - start:6.1f} s] {stage}"
        if somebody_looks():
            print(line, file=sys.stderr, flush=True)
        else:
            log.print(line)

    return show


class Log:
    """Prints a line on stderr where `SILENCE` has passed since the last one, or since the start."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def print(self, line: str) -> None:
        """Print it, or not; nothing where there is no stderr."""
        now = time.monotonic()
        if sys.stderr is not None and now - self._last >= SILENCE:
            self._last = now
            print(line, file=sys.stderr, flush=True)
