"""The process around a command that may die: a crash of a native library is one line, status 1.

`supervise` forks before anything is imported. The child does the work; the parent, which holds
nothing but Python, waits, passes signals on and ends as the child did. Where the child crashed, it
removes what is half-written and says which engine was at work on which file
(edgekit/common/last_words.py).

What C and C++ write to descriptor 2 is shown when the command has ended: of what a library says
while it crashes, the one line quotes the last instead. How long a process takes to die of what it
said cannot be known. Python's own stderr stays what it was.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from edgekit.common.last_words import SharedWords, Words, leave_words_in
from edgekit.errors import json_for_program, wants_json

_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_WAITED_FOR = _PASSED_ON | {signal.SIGCHLD}
_NO_CRASH = _PASSED_ON | {signal.SIGPIPE}
_LONGEST_END = 4096  # bytes, of which the last line is looked for
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def supervise() -> None:
    """Return in a child process, which the caller goes on as; the parent never returns.

    Does nothing where a fork would lose threads of the program around, nor outside Linux.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return
    _open_standard_streams()
    words, chatter = SharedWords(), os.memfd_create("stderr")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    parent, child = os.getpid(), os.fork()
    if child:
        _watch(child, words, chatter)
    _end_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _divert_native_stderr(chatter)
    leave_words_in(words)


def _open_standard_streams() -> None:
    """Give descriptors that the caller closed to no file: the next one opened would be `stderr`."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _end_with(parent: int) -> None:
    """Let the system kill this process with its parent, as if there were but one."""
    import ctypes  # here: it takes longer than the fork

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _divert_native_stderr(chatter: int) -> None:
    """Let descriptor 2 be `chatter`, and Python's stderr a copy of what it was."""
    if sys.stderr is None:  # closed by the caller
        return
    sys.stderr.flush()
    own = os.dup(2)
    os.dup2(chatter, 2)
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    sys.stderr = open(own, "w", 1, encoding, errors)  # noqa: SIM115, PTH123


def _watch(child: int, words: SharedWords, chatter: int) -> NoReturn:
    """Wait for the child, passing signals on; end as it did."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller that ignores it would hide the end
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _end_as(os.waitstatus_to_exitcode(status), words, chatter)
        came = signal.sigwaitinfo(_WAITED_FOR)
        # A key on the terminal reaches the child by itself.
        if came.si_signo in _PASSED_ON and came.si_code <= 0:
            with suppress(ProcessLookupError):
                os.kill(child, came.si_signo)


def _end_as(code: int, words: SharedWords, chatter: int) -> NoReturn:
    """End with the child's exit status or by its signal; after a crash, with one line."""
    last = words.read()
    if last.partial or last.folders:
        _remove(last)
    if code < 0 and -code not in _NO_CRASH:
        from edgekit.runtime.engines.crash import crash_line

        line = crash_line(-code, last, f"{_end_of(chatter)}\n{_end_of(words.hidden)}")
        start = "\n" if os.isatty(2) else ""  # whatever stands on the terminal's line
        if wants_json(sys.argv[1:]):
            said = json_for_program(line.removeprefix("edgekit: "), 1)
            with suppress(OSError):
                os.write(1, f"{said}\n".encode())
        with suppress(OSError):
            os.write(2, f"{start}{line}\n".encode(errors="backslashreplace"))
        os._exit(1)
    _show(chatter)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED_FOR)
    os._exit(code if code >= 0 else 128 - code)  # of a signal: the first process cannot be killed


def _show(chatter: int) -> None:
    """Print all that the child's libraries wrote."""
    place = 0
    while data := os.pread(chatter, 1 << 16, place):
        place += len(data)
        with suppress(OSError):  # nobody reads it
            os.write(2, data)


def _end_of(file: int) -> str:
    begin = max(0, os.fstat(file).st_size - _LONGEST_END)
    return os.pread(file, _LONGEST_END, begin).decode(errors="replace")


def _remove(words: Words) -> None:
    """Remove what is half-written, and folders in which nothing is kept."""
    import shutil

    for name in words.partial:
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # the line that says what happened comes in any case
                path.unlink()
    for name in words.folders:
        with suppress(OSError):
            Path(name).rmdir()


def is_work(arguments: list[str]) -> bool:
    """Whether a command line names a command to be carried out, rather than asking for help."""
    return bool(arguments) and arguments[0][:1] != "-" and not {"-h", "--help"} & {*arguments}
