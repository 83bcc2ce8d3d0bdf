"""Progress of long work: one line a stage on stderr, and nothing where nobody is looking."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[str], None]


def stage_printer() -> Progress:
    """Return a function that prints a stage with the seconds since the start, on a terminal."""
    start = time.monotonic()

    def show(stage: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"[{time.monotonic() - start:6.1f} s] {stage}", file=sys.stderr, flush=True)

    return show
