"""What this process is at, kept where whoever started it can still read it after its death.

A native library that crashes takes the process with it, and no `finally` runs. So the engine that
is at work and what is half-written stand in memory shared with the supervisor
(edgekit/supervisor.py). Without one, as in a program that calls edgekit, nothing is kept.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

_BYTES = 1 << 16  # for a few paths; the system gives a page only where one is written
_LENGTH = 4  # bytes of the length before the text
NO_ENGINE = -1


@dataclass
class Words:
    """The engine and the file at work, what is half-written, what a library said at its end.

    Of `engines`, which were opened in turn, the one at index `active` computes; of `folders`,
    which may hold what is to be kept, only empty ones are to be removed.
    """

    engines: list[tuple[str, str]] = field(default_factory=list)
    active: int = NO_ENGINE
    partial: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    said: str | None = None


class SharedWords:
    """Memory in which a process writes its `Words` for the one that it was forked from.

    `hidden` is a descriptor of what libraries say that the user is not to see, if all goes well.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BYTES)
        self.hidden = os.memfd_create("hidden")

    def write(self, words: Words) -> None:
        """Replace what stands there; too much for it is left out, not cut."""
        data = json.dumps(asdict(words)).encode()
        if len(data) + _LENGTH <= _BYTES:
            self._memory[: _LENGTH + len(data)] = len(data).to_bytes(_LENGTH, "little") + data

    def read(self) -> Words:
        """Return what was written last; nothing where a crash broke it off."""
        length = int.from_bytes(self._memory[:_LENGTH], "little")
        try:
            return Words(**json.loads(self._memory[_LENGTH : _LENGTH + length]))
        except ValueError:
            return Words()


_words = Words()
_shared: SharedWords | None = None
_hiding = False


def leave_words_in(shared: SharedWords) -> None:
    """Write there from now on."""
    global _shared
    _shared = shared
    _write()


def heard() -> bool:
    """Whether somebody is there to read them."""
    return _shared is not None


def engine_opens(name: str, path: Path) -> int:
    """Note that an engine begins to load a file; return what `engine_works` takes."""
    if not heard():
        return NO_ENGINE
    _words.engines.append((name, str(path)))
    return engine_works(len(_words.engines) - 1)


def engine_works(number: int) -> int:
    """Note which of the engines computes, `NO_ENGINE` for none; return it."""
    if number != _words.active:
        _words.active = number
        _write()
    return number


def engine_at_work() -> int:
    """Return which of the engines computes."""
    return _words.active


@contextmanager
def engine_on(name: str, path: Path) -> Iterator[None]:
    """Note that an engine computes on a file in the block, and what did before after it."""
    before = _words.active
    engine_opens(name, path)
    try:
        yield
    finally:
        engine_works(before)


def library_said(reason: str) -> None:
    """Note what a library gives as its reason to end the process."""
    _words.said = reason
    _write()


@contextmanager
def hidden_output() -> Iterator[IO[str]]:
    """Give an empty file for what libraries print; should the process die, it is quoted from it."""
    global _hiding
    if _shared is None or _hiding:
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            yield file
        return
    _hiding = True
    try:
        with os.fdopen(os.dup(_shared.hidden), "w+", errors="replace") as file:
            file.truncate(0)
            try:
                yield file
            finally:  # else a later crash would be told in these words
                file.seek(0)
                file.truncate()
    finally:
        _hiding = False


@contextmanager
def half_written(path: Path, *, keep_if_filled: bool = False) -> Iterator[None]:
    """Have `path`, a file or a folder, removed should the process die in the block.

    `keep_if_filled`: a folder only where it is empty.
    """
    listed, name = _words.folders if keep_if_filled else _words.partial, str(path.absolute())
    listed.append(name)
    _write()
    try:
        yield
    finally:
        listed.remove(name)
        _write()


def _write() -> None:
    if _shared is not None:
        _shared.write(_words)
