"""This machine."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from edgekit.devices.hosts.host import Interpreter, Process
from edgekit.errors import EdgekitError


class LocalHost:
    """This machine; below another `root`, a recorded tree of files in the place of its own."""

    name = "this machine"

    def __init__(self, root: Path = Path("/")) -> None:
        """Read files below `root`; processes and CPUs are this machine's in any case."""
        self.python: Interpreter | None = Interpreter((sys.executable,), platform.python_version())
        self._root = root

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes; None where it is missing or cannot be read."""
        try:
            return self._place(path).read_bytes()
        except OSError:
            return None

    def entries(self, path: str) -> list[str]:
        """Return the names in a folder; none where it cannot be read."""
        try:
            return [entry.name for entry in self._place(path).iterdir()]
        except OSError:
            return []

    def cpus(self) -> frozenset[int]:
        """Return the CPUs of this process's affinity, which its children inherit."""
        return frozenset(os.sched_getaffinity(0))

    def put(self, path: Path) -> str:
        """Return the absolute path: it is here already."""
        try:
            return str(path.resolve(strict=True))
        except OSError as error:
            raise EdgekitError(f"{path}: {error.strerror}") from error

    def get(self, path: str, to: Path) -> None:
        """Copy a file, whole or not at all."""
        from edgekit.common.files import new_file

        found = self.read(path)
        if found is None:
            raise EdgekitError(f"{path}: cannot be read on {self.name}")
        with new_file(to) as scratch:
            scratch.write_bytes(found)

    def start(self, command: Sequence[str]) -> Process:
        """Start a process, which ends when its stdin does or when it is killed."""
        from edgekit.devices.hosts.local_process import LocalProcess

        return LocalProcess(command)

    def _place(self, path: str) -> Path:
        return self._root / path.lstrip("/")


LOCAL = LocalHost()
