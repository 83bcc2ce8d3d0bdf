"""Runs a `.pte` program through ExecuTorch's own Python binding.

The binding is imported from its compiled module rather than through `portable_lib` and
`custom_ops.py`: those pull in the exporter and torchao, which adds ten seconds of start, 140 MB
and a screen of warnings to a process that only wants to run a file.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import IO, Any, cast

import torch

# After torch: the binding links against its libraries.
from executorch.extension.pybindings import _C as binding
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.pte_header import PteHeader
from edgekit.runtime.engine import Logits, OneSequenceEngine, TokenIds, physical_cores

Constant = int | bool | list[int]

FORWARD = "forward"
INT64 = 4  # executorch/runtime/core/portable_type/scalar_type.h


class ExecutorchEngine(OneSequenceEngine):
    """A `.pte` whose `forward` takes `tokens int64 [1, n]` and `input_pos int64 [1]`.

    The file is memory-mapped, so its weights cost memory only where a delegate repacks them.
    """

    name = "executorch"
    version = metadata.version("executorch")

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load a file; `threads` sizes the one pool that all engines of this process share."""
        super().__init__()
        check_program_file(path)
        with _chatter() as log:
            try:
                _set_threads(threads or physical_cores())
                self._load(path)
            except RuntimeError as error:
                log.seek(0)
                reason = _reason(error, log.read())
                raise EdgekitError(f"executorch cannot load {path}: {reason}") from error
        _OPEN.add(self)

    def _load(self, path: Path) -> None:
        _register_kernels()
        # Of the binding's ways to load, this one maps the file.
        self._program = binding._load_program(
            os.fsencode(path), program_verification=binding.Verification.InternalConsistency
        )
        names = {self._program.get_method_name(i) for i in range(self._program.num_methods())}
        if FORWARD not in names:
            raise EdgekitError(f"{path} has no method {FORWARD!r}, only {', '.join(sorted(names))}")
        self.metadata = {
            name: self._constant(name) for name in sorted(names - {FORWARD}) if self._is_plain(name)
        }
        self._method: Any = self._program.load_method(FORWARD)
        self._take_shapes(path)

    def _is_plain(self, name: str) -> bool:
        """Whether a method is one of the constants that a language model's runner reads."""
        named = name.startswith(("get_", "use_", "enable_"))
        return named and self._program.method_meta(name).num_inputs() == 0

    def _constant(self, name: str) -> Constant:
        values = self._program.load_method(name).call(())
        # The binding does not tell a value from a list of one; of ids there may be several.
        single = len(values) == 1 and not name.endswith("_ids")
        return cast(Constant, values[0] if single else values)

    def _take_shapes(self, path: Path) -> None:
        """Read bounds from `forward` itself where the constant methods do not state them."""
        meta = self._method.method_meta()
        if not _is_language_model(meta):
            raise EdgekitError(
                f"{path}: forward must take tokens int64 [1, n] and input_pos int64 [1]"
            )
        self.longest_chunk = int(meta.input_tensor_meta(0).sizes()[1])
        self.vocab_size = int(meta.output_tensor_meta(0).sizes()[-1])
        stated = self.metadata.get("get_max_context_len", self.metadata.get("get_max_seq_len"))
        self.context = self.longest_chunk if stated is None else cast(int, stated)
        chunk = self.metadata.get("get_prefill_chunk", self.longest_chunk)
        if not isinstance(chunk, int) or not 1 <= chunk <= self.longest_chunk:
            raise EdgekitError(
                f"{path}: get_prefill_chunk must be 1 to {self.longest_chunk}, not {chunk!r:.60}"
            )
        self.default_chunk = chunk
        stated_ends = self.metadata.get("get_eos_ids", self.metadata.get("get_eos_id"))
        ends = stated_ends if isinstance(stated_ends, list) else [stated_ends]
        self.eos_ids = tuple(end for end in ends if type(end) is int)
        self._tokens = torch.zeros((1, self.longest_chunk), dtype=torch.int64)
        self._input_pos = torch.zeros(1, dtype=torch.int64)

    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        given = self._tokens[:, : len(tokens)]
        given.copy_(torch.from_numpy(tokens))
        self._input_pos.fill_(position)
        log = StringIO()
        try:
            with redirect_stderr(log):  # the binding logs through it
                # Inputs are passed by address. The output is copied once: without the copy the
                # array would change at the next call and dangle after close().
                output = cast(Tensor, self._method.call((given, self._input_pos))[0])
        except RuntimeError as error:
            raise EdgekitError(
                f"executorch failed on {len(tokens)} tokens at position {position}: "
                f"{_reason(error, log.getvalue())}"
            ) from error
        # A program that returns logits for every token is accepted: the last row is ours.
        return cast(Logits, output.float().reshape(-1, self.vocab_size)[-1].numpy())

    def close(self) -> None:
        """Unmap the file and free the program's memory."""
        super().close()
        _OPEN.discard(self)
        self._method = self._program = None


def open_engine(model_path: Path, threads: int | None, context: int | None) -> ExecutorchEngine:
    """Open a `.pte` file; its context was fixed when it was exported."""
    return ExecutorchEngine(model_path, threads)


def check_program_file(path: Path) -> None:
    """Refuse a file that is not a complete `.pte`.

    The run time maps the file and trusts the sizes in its header: a truncated one would end the
    process by a bus error when a missing page is read.
    """
    if not PteHeader.read(path).complete:
        raise EdgekitError(f"{path}: is damaged: its ExecuTorch header is not readable")


# Every open engine holds the address of the process's one thread pool.
_OPEN: weakref.WeakSet[ExecutorchEngine] = weakref.WeakSet()


def _set_threads(threads: int) -> None:
    """Size the thread pool; it cannot change under an engine that is already using it."""
    now = binding._threadpool_get_thread_count()
    if now == threads:
        return
    if _OPEN:
        raise EdgekitError(
            f"an open engine of this process uses {now} threads; close it to load with {threads}"
        )
    binding._unsafe_reset_threadpool(threads)


def _register_kernels() -> None:
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


def _is_language_model(meta: binding.MethodMeta) -> bool:
    if meta.num_inputs() != 2 or meta.num_outputs() < 1:
        return False
    tokens, start = meta.input_tensor_meta(0), meta.input_tensor_meta(1)
    return (
        (tokens.dtype(), start.dtype()) == (INT64, INT64)
        and len(tokens.sizes()) == 2
        and tuple(start.sizes()) == (1,)
    )


@contextmanager
def _chatter() -> Iterator[IO[str]]:
    """Send what C++ says about itself to a scratch file instead of the user's terminal.

    The binding hands ExecuTorch's log to Python's `sys.stderr`; the libraries below it write to
    the process's descriptor 2.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log, redirect_stderr(log):
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


def _reason(error: RuntimeError, log: str) -> str:
    """Of what C++ wrote, the line that says why; otherwise what the binding raised."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if line and "cpuinfo" not in line and "threadpool" not in line]
    missing = (line for line in said if "Missing operator: " in line)
    return next(missing, said[0] if said else str(error))
