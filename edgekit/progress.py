"""Progress of long work: how it is told, and one line a stage where somebody is looking."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with the stage that begins."""
Steps = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next or the figures so far)."""


def somebody_looks() -> bool:
    """Whether stderr is a terminal; Python has None for it where the caller closed it."""
    return sys.stderr is not None and sys.stderr.isatty()


def no_steps(done: int, total: int, label: str) -> None:
    """Tell nobody."""


def stage_printer() -> Progress:
    """Return a function that prints a stage with the seconds since the start, on a terminal."""
    start = time.monotonic()

    def show(stage: str) -> None:
        if somebody_looks():
            print(f"[{time.monotonic() - start:6.1f} s] {stage}", file=sys.stderr, flush=True)

    return show
