"""Ctrl-C while there is nothing to put in order: the signal itself ends the process, at once.

Python's own KeyboardInterrupt is lost where a library catches every error, as numpy and torch do
in places while they are imported: the command would go on as if nobody had pressed a key.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_end_the_process() -> Iterator[None]:
    """For imports and other work that leaves nothing behind; a shell reports status 130.

    Does nothing where the program around has its own idea of SIGINT, or outside the main thread.
    """
    usual = signal.default_int_handler
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
