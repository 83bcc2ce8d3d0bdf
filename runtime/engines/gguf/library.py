"""llama.cpp's C interface, from llama-cpp-python's low-level bindings, and what it says.

llama.cpp reports through one callback for the whole process. Nothing of it reaches stderr; what it
calls an error is kept for the caller who asks why a call failed.
"""

import ctypes
import os
from collections import deque

import llama_cpp
import llama_cpp.llama_cpp as llama

from edgekit.common.files import remove_unfinished
from edgekit.common.last_words import heard, library_said
from edgekit.errors import EdgekitError, EngineCrash

VERSION = f"{llama_cpp.__version__} (llama.cpp {llama.llama_version().decode()})"
BUILT = " ".join(llama.llama_print_system_info().decode().split()).rstrip("| ")
"""The instructions that it was compiled for, as in `CPU : SSE3 = 1 | AVX = 1`."""

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_errors: deque[str] = deque(maxlen=16)


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes | None, user_data: object) -> None:
    if level == _ERROR and text:
        _errors.append(" ".join(text.decode(errors="replace").split()))


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _aborted(message: bytes | None) -> None:
    """End the process with one line where ggml would end it with a backtrace and a core dump.

    ggml checks itself by assertions, some of which a strange file can break, and there is no way
    back from one: abort() follows this call. A supervisor has the line of that.
    """
    text = " ".join((message or b"").decode(errors="replace").split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    place, colon, reason = text[:400].partition(": ")  # the place on the machine that compiled it
    said = f"{place.rpartition('/')[2]}{colon}{reason}"
    if heard():
        library_said(said)
        return
    os.write(2, f"edgekit: llama.cpp gave up: {said}\n".encode())
    remove_unfinished()
    os._exit(EngineCrash.exit_status)


def start() -> None:
    """Prepare the library and forget earlier errors; may be called again and again."""
    # Importing llama_cpp, here or elsewhere, sets a callback of its own, which prints.
    llama.llama_log_set(_listen, None)
    llama._lib.ggml_set_abort_callback(_aborted)
    llama.llama_backend_init()
    _errors.clear()


def failure(doing: str) -> EdgekitError:
    """Return an error of what was being done and why it failed: the first error since `start`.

    Those after it only say that the callers failed, too.
    """
    reason = _errors[0] if _errors else "it says nothing more"
    return EdgekitError(f"llama.cpp {doing}: {_without_place(reason)}")


def _without_place(line: str) -> str:
    """Drop what llama.cpp puts before what it says: names of functions, what we say ourselves."""
    head, colon, rest = line.partition(": ")
    if colon and (head == "error loading model" or head.replace("_", "").isalnum()):
        return _without_place(rest)
    return line[:300]
