"""A process of this machine that takes lines and answers with lines."""

import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from edgekit.common.process_end import last_line
from edgekit.devices.hosts.host import End
from edgekit.errors import EdgekitError


class LocalProcess:
    """A child of this process."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it; what it writes to stderr is kept for its last words."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `kill`)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            self._stderr.close()
            raise EdgekitError(f"{command[0]}: cannot be started: {error.strerror}") from error

    def send(self, line: str) -> None:
        """Give it a line; one that nobody reads any more is lost."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def receive(self) -> str | None:
        """Wait for its next line; None where there is none any more."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line.removesuffix("\n") if line else None

    def wait(self) -> End:
        """Wait until it has ended."""
        status = self._process.wait()
        self._stderr.seek(0)
        return End(status, last_line(self._stderr.read().decode(errors="replace")))

    def kill(self) -> None:
        """End it, also in the middle of a computation, and close its streams."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with suppress(BrokenPipeError):  # a line that nobody reads any more
                if stream is not None:
                    stream.close()
