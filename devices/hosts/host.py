"""A machine as a parameter: its files and its processes, and nothing of models or benchmarks.

Whoever probes or measures asks a `Host`, so that another machine can stand in this one's place. It
need not share a folder with this one, nor have Python; its processes are reached by their lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Interpreter:
    """A Python with edgekit in it: the command that runs it, and its version."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class End:
    """How a process ended.

    `status` is its exit status, a signal's number below zero, None where the way to the process
    was lost before it ended; `last_words` is the last line that it wrote to stderr, often empty.
    """

    status: int | None
    last_words: str


class Process(Protocol):
    """A running process that takes lines and answers with lines (UTF-8)."""

    def send(self, line: str) -> None:
        """Give it a line, without its newline. One that nobody reads any more is lost."""
        ...

    def receive(self) -> str | None:
        """Wait for its next line; None where it ended, or closed its stdout."""
        ...

    def wait(self) -> End:
        """Wait until it has ended."""
        ...

    def kill(self) -> None:
        """End it, also in the middle of its work, and release what belongs to it."""
        ...


class Host(Protocol):
    """A machine. Its paths are absolute and its own; this machine's are a `Path`.

    `name` is what messages call it. `python` is None where processes are to be anything else.
    """

    name: str
    python: Interpreter | None

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None where it is missing or cannot be read."""
        ...

    def entries(self, path: str) -> list[str]:
        """Return the names in a folder, in any order; none where it cannot be read."""
        ...

    def cpus(self) -> frozenset[int]:
        """Return the numbers of the logical CPUs that a process started here may use."""
        ...

    def put(self, path: Path) -> str:
        """Bring a file or a folder of this machine; returns where processes find it.

        Raises `EdgekitError` where it cannot be read or there is no room for it.
        """
        ...

    def get(self, path: str, to: Path) -> None:
        """Fetch a file, whole or not at all; raises `EdgekitError` where that fails."""
        ...

    def start(self, command: Sequence[str]) -> Process:
        """Start a process by its program and arguments; raises `EdgekitError` where it cannot."""
        ...


def boot_id(host: Host) -> str | None:
    """Return what is another after each start of the machine; None where it does not say."""
    found = host.read("/proc/sys/kernel/random/boot_id")
    return None if found is None else found.decode(errors="replace").strip() or None
