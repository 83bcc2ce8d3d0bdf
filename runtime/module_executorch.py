"""Runs an exported module through ExecuTorch's Python binding."""

import os
import weakref
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch

# After torch: the binding links against its libraries.
from executorch.extension.pybindings import _C as binding
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.runtime.engine import physical_cores
from edgekit.runtime.executorch_engine import (
    _OPEN,
    FORWARD,
    _chatter,
    _reason,
    _register_kernels,
    _set_threads,
    check_program_file,
)
from edgekit.runtime.module_engine import Array, ClosesItself, contiguous

# The registry of engines by which the size of the one pool is guarded.
_USES_THE_POOL = cast("weakref.WeakSet[Any]", _OPEN)


class ExecutorchModule(ClosesItself):
    """A `.pte` whose `forward` takes and returns tensors."""

    name = "executorch"
    version = metadata.version("executorch")

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load a file; `threads` sizes the one pool that all engines of this process share."""
        check_program_file(path)
        with _chatter() as log:
            try:
                _set_threads(threads or physical_cores())
                _register_kernels()
                self._program = binding._load_program(
                    os.fsencode(path),
                    program_verification=binding.Verification.InternalConsistency,
                )
                self._method: Any = self._program.load_method(FORWARD)
            except RuntimeError as error:
                log.seek(0)
                reason = _reason(error, log.read())
                raise EdgekitError(f"executorch cannot load {path}: {reason}") from error
        _USES_THE_POOL.add(self)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the module on its inputs, in order."""
        tensors = tuple(torch.from_numpy(item) for item in contiguous(inputs))
        log = StringIO()
        try:
            with redirect_stderr(log):  # the binding logs through it
                found = self._method.call(tensors)
        except RuntimeError as error:
            raise EdgekitError(
                f"executorch failed on the module: {_reason(error, log.getvalue())}"
            ) from error
        # Copied: the tensors lie in memory that the next call writes.
        return [item.clone().numpy() for item in found if isinstance(item, Tensor)]

    def close(self) -> None:
        """Unmap the file and free the program's memory."""
        _USES_THE_POOL.discard(self)
        self._method = self._program = None


def open_module(path: Path, threads: int | None) -> ExecutorchModule:
    """Open a `.pte` file."""
    return ExecutorchModule(path, threads)
