"""Bounds on what foreign text may cost: a recipe's regular expressions, a chat template.

Both are small programs. Ours take milliseconds; a hostile or clumsy one would hang the command or
take all memory, and which one does cannot be told by its looks.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from edgekit.errors import EdgekitError

CPU_SECONDS = 5.0
MEMORY_BYTES = 256 << 20


class TooCostly(EdgekitError):
    """A bound was reached; the message goes on from the name of what reached it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TooCostly where the block takes more CPU time or further memory than allowed.

    CPU time, so that a busy or suspended machine refuses nothing. Signals reach Python's main
    thread alone, so in other threads the time is not bounded.
    """
    with _bounded_memory():
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGPROF, _time_is_up)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TooCostly(f"takes more than {CPU_SECONDS:g} s")


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Lower the limit of the address space for a while; the system does the counting."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux: only the time is bounded
        yield
        return
    before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = pages * resource.getpagesize() + MEMORY_BYTES
    limits = [allowed, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    except MemoryError as error:
        raise TooCostly(f"takes more than {MEMORY_BYTES >> 20} MiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
