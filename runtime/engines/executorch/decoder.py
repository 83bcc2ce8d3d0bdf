"""Runs a language model's `.pte` through ExecuTorch's own Python binding."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch

# After torch: the binding links against its libraries.
from executorch.extension.pybindings import _C as binding
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits
from edgekit.runtime.engines.engine import OneSequenceEngine, Threads, TokenIds
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

Constant = int | bool | list[int]

OURS = "get_prefill_chunk"
"""A constant method that only programs of edgekit's have."""

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
        self._path, self._stale = path, False
        check_program_file(path)
        self.threads = Threads.for_both(threads)
        with _reasons(path):
            set_threads(self.threads.prompt)
            self._load(path)
        OPEN_ENGINES.add(self)

    def _load(self, path: Path) -> None:
        register_kernels()
        self._program = load_program(path)
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
        chunk = self.metadata.get(OURS, self.longest_chunk)
        if not isinstance(chunk, int) or not 1 <= chunk <= self.longest_chunk:
            raise EdgekitError(
                f"{path}: {OURS} must be 1 to {self.longest_chunk}, not {chunk!r:.60}"
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
        self._stale = True
        log = StringIO()
        try:
            with redirect_stderr(log):  # the binding logs through it
                # Inputs are passed by address. The output is copied once: without the copy the
                # array would change at the next call and dangle after close().
                output = cast(Tensor, self._method.call((given, self._input_pos))[0])
        except RuntimeError as error:
            raise EdgekitError(
                f"executorch failed on {len(tokens)} tokens at position {position}: "
                f"{reason(error, log.getvalue())}"
            ) from error
        # A program that returns logits for every token is accepted: the last row is ours.
        return cast(Logits, output.float().reshape(-1, self.vocab_size)[-1].numpy())

    def reset(self) -> None:
        """Forget every token.

        A program of edgekit's starts anew whenever it is run at position 0. Others may not: what
        export_llm writes keeps a short convolution's inputs, so such a program is loaded again.
        """
        super().reset()
        if self._stale and OURS not in self.metadata:
            self._method = self._program = None  # two copies of packed weights are too many
            check_program_file(self._path)
            with _reasons(self._path):
                self._program = load_program(self._path)
                self._method = self._program.load_method(FORWARD)
        self._stale = False

    def close(self) -> None:
        """Unmap the file and free the program's memory."""
        super().close()
        OPEN_ENGINES.discard(self)
        self._method = self._program = None


def open_engine(model_path: Path, threads: int | None, context: int | None) -> ExecutorchEngine:
    """Open a `.pte` file; its context was fixed when it was exported."""
    return ExecutorchEngine(model_path, threads)


@contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turn what the binding raises while it loads a file into one line with the reason."""
    with chatter() as log:
        try:
            yield
        except RuntimeError as error:
            log.seek(0)
            said = reason(error, log.read())
            raise EdgekitError(f"executorch cannot load {path}: {said}") from error


def _is_language_model(meta: binding.MethodMeta) -> bool:
    if meta.num_inputs() != 2 or meta.num_outputs() < 1:
        return False
    tokens, start = meta.input_tensor_meta(0), meta.input_tensor_meta(1)
    return (
        (tokens.dtype(), start.dtype()) == (INT64, INT64)
        and len(tokens.sizes()) == 2
        and tuple(start.sizes()) == (1,)
    )
