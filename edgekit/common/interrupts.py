"""Ctrl-C and SIGTERM: with nothing to put in order, the signal itself ends the process, at once.

Otherwise both raise, so that what is half-written is removed.

Python's own KeyboardInterrupt is lost where a library catches every error, as numpy and torch do
in places while they are imported: the command would go on as if nobody had pressed a key.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from edgekit.errors import Terminated


def clean_up_on_sigterm() -> None:
    """Let SIGTERM raise `Terminated`, unless the program around has its own idea of it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the cleaning
    raise Terminated(Terminated.exit_status)


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """For imports and other work that leaves nothing behind; a shell reports status 130, or 143.

    Leaves a signal alone of which the program around has its own idea; does nothing outside the
    main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])
