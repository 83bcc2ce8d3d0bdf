"""What is said where a native library ends its process: who, on which file, and what to do."""

import signal
from typing import cast

from edgekit.common.last_words import NO_ENGINE, Words
from edgekit.common.process_end import how_it_ended, last_line, quoted
from edgekit.errors import line_for_user
from edgekit.runtime.engines.library import Library
from edgekit.runtime.engines.registry import ENGINES

_OUT_OF_MEMORY = (
    "the system does this when memory runs out: take a smaller model or context, or end other work"
)


def crash_line(number: int, words: Words, written: str) -> str:
    """Return the line for a command that died of a signal; `written` is what it wrote to stderr."""
    said, end = words.said or last_line(written), how_it_ended(-number)
    if words.active == NO_ENGINE:
        again = "EDGEKIT_TRACEBACK=1 shows where"
        advice = _OUT_OF_MEMORY if number == signal.SIGKILL else again
        return line_for_user(f"the command was ended by {end}{quoted(said)}; {advice}")
    engine, path = words.engines[words.active]
    return line_for_user(
        f"{path}: {library_of(engine).name} was ended by {end}{quoted(said)}; "
        f"{advice_after(number, engine)}"
    )


def library_of(engine: str) -> Library:
    """Return what is said of an engine's library."""
    return cast(Library, ENGINES.load(engine, "installed").LIBRARY)


def advice_after(number: int, engine: str) -> str:
    """Return what to do where an engine ran, was at work on a file, and died of a signal."""
    if number == signal.SIGKILL:
        return _OUT_OF_MEMORY
    if number == signal.SIGILL:
        return f"it was made for another CPU: {library_of(engine).reinstall_command()}"
    return (
        f"the file is damaged or the library broken: {library_of(engine).reinstall_command()}; "
        "EDGEKIT_TRACEBACK=1 shows where"
    )
