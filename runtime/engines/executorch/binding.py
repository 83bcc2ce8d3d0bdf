"""ExecuTorch's Python binding, as every engine of ExecuTorch files uses it.

It is imported from its compiled module rather than through `portable_lib` and `custom_ops.py`:
those pull in the exporter and torchao, which adds ten seconds of start, 140 MB and a screen of
warnings to a process that only wants to run a file.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

# After torch: the binding links against its libraries.
from executorch.extension.pybindings import _C as binding

from edgekit.common.last_words import hidden_output
from edgekit.errors import EdgekitError
from edgekit.formats.pte.header import PteHeader

FORWARD = "forward"


def load_program(path: Path) -> Any:  # noqa: ANN401 - the binding is not typed
    """Map a file; of the binding's ways to load, this one does."""
    return binding._load_program(
        os.fsencode(path), program_verification=binding.Verification.InternalConsistency
    )


def check_program_file(path: Path) -> None:
    """Refuse a file that is not a complete `.pte`.

    The runtime maps the file and trusts the sizes in its header: a truncated one would end the
    process by a bus error when a missing page is read.
    """
    if not PteHeader.read(path).complete:
        raise EdgekitError(f"{path}: is damaged: its ExecuTorch header is not readable")


# Every open engine holds the address of the process's one thread pool.
OPEN_ENGINES: weakref.WeakSet[Any] = weakref.WeakSet()


def set_threads(threads: int) -> None:
    """Size the thread pool; it cannot change under an engine that is already using it."""
    now = binding._threadpool_get_thread_count()
    if now == threads:
        return
    if OPEN_ENGINES:
        raise EdgekitError(
            f"an open engine of this process uses {now} threads; close it to load with {threads}"
        )
    binding._unsafe_reset_threadpool(threads)


def register_kernels() -> None:
    """Load the operator libraries of language models and of quantized embeddings."""
    spec = find_spec("executorch")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder, library in (
        ("extension/llm/custom_ops", "*custom_ops_aot_lib.*"),
        ("kernels/quantized", "*quantized_ops_aot_lib.*"),
    ):
        found = [file for root in roots for file in (root / folder).glob(library)]
        if not found:
            raise EdgekitError(f"the executorch package has no {folder}/{library}; reinstall it")
        torch.ops.load_library(str(found[0]))


@contextmanager
def chatter() -> Iterator[IO[str]]:
    """Send what C++ says about itself to a scratch file instead of the user's terminal.

    The binding hands ExecuTorch's log to Python's `sys.stderr`; the libraries below it write to
    the process's descriptor 2.
    """
    with hidden_output() as log, redirect_stderr(log):
        try:
            kept = os.dup(2)
        except OSError:  # the process was started without a stderr
            yield log
            return
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def reason(error: RuntimeError, log: str) -> str:
    """Of what C++ wrote, the line that says why; otherwise what the binding raised."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if line and "cpuinfo" not in line and "threadpool" not in line]
    missing = (line for line in said if "Missing operator: " in line)
    return next(missing, said[0] if said else str(error))
