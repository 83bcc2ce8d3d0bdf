"""Runs an exported module through ExecuTorch's Python binding."""

from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.devices.cpus import default_threads
from edgekit.errors import EdgekitError
from edgekit.runtime.engines.executorch.binding import (
    FORWARD,
    OPEN_ENGINES,
    chatter,
    check_program_file,
    load_program,
    reason,
    register_kernels,
    set_threads,
)
from edgekit.runtime.engines.network_engine import Array, OneNetworkEngine


class ExecutorchModule(OneNetworkEngine):
    """A `.pte` whose `forward` takes and returns tensors."""

    name = "executorch"
    version = metadata.version("executorch")

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load a file; `threads` sizes the one pool that all engines of this process share."""
        super().__init__()
        check_program_file(path)
        self.threads = threads or default_threads()
        with chatter() as log:
            try:
                set_threads(self.threads)
                register_kernels()
                self._program = load_program(path)
                self._method: Any = self._program.load_method(FORWARD)
            except RuntimeError as error:
                log.seek(0)
                said = reason(error, log.read())
                raise EdgekitError(f"executorch cannot load {path}: {said}") from error
        OPEN_ENGINES.add(self)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the module on its inputs, in order."""
        tensors = tuple(torch.from_numpy(item) for item in self._laid_out(inputs))
        log = StringIO()
        try:
            with redirect_stderr(log):  # the binding logs through it
                found = self._method.call(tensors)
        except RuntimeError as error:
            raise EdgekitError(
                f"executorch failed on the module: {reason(error, log.getvalue())}"
            ) from error
        # Copied: the tensors lie in memory that the next call writes.
        return [item.clone().numpy() for item in found if isinstance(item, Tensor)]

    def close(self) -> None:
        """Unmap the file and free the program's memory."""
        OPEN_ENGINES.discard(self)
        self._method = self._program = None


def open_module(path: Path, threads: int | None) -> ExecutorchModule:
    """Open a `.pte` file."""
    return ExecutorchModule(path, threads)
