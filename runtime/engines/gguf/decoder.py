"""Runs a GGUF file in llama.cpp on the CPU, through the low-level bindings of llama-cpp-python.

The settings are those of `llama-bench`: flash attention where the backend has it, keys, values in
float16, 512 tokens in one pass. One differs: where llama.cpp repacks most weights for the CPU's
vector instructions, the file is read into memory, else mapped. Of a mapped file the pages stay
resident beside the repacked copy, of a file that is read only the copy is kept. Peak of the process
(VmHWM, MiB) after 512 + 8 tokens of LFM2-350M, llama-cpp-python 0.3.36, AMD Zen 4, where Q4_0 is
repacked and Q8_0 is not:

    | file | bytes | mapped | read | mapped, no repacking | read, no repacking |
    | --- | --- | --- | --- | --- | --- |
    | Q8_0 | 361 | 476 | 476 | 476 | 477 |
    | Q4_0 | 208 | 476 | 324 | 324 | 324 |

What need not be read is mapped: its decode is some 5 % faster (Q8_0, median of 6 interleaved runs
on a quiet machine, 2 threads: 61.9 against 59.1 tok/s) and so is loading.

A small model decodes with one thread unless the caller gives a number: threads meet at every
operator, a few microseconds apart, and each meeting waits for the one that has lost its CPU.
lfm2-tiny (6.5 MB a token) on 2 CPUs beside a load that comes and goes: 10 tok/s with two threads,
310 with one (medians); on quiet CPUs 1313 and 1538. From 135M parameters up all threads are faster
beside such a load, too. A prompt has enough to do between two meetings.
"""

import ctypes
import platform
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import llama_cpp.llama_cpp as llama
import numpy as np

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import GgufFile
from edgekit.metrics.logits import Logits
from edgekit.runtime.engines.engine import (
    DEFAULT_CONTEXT,
    OneSequenceEngine,
    Threads,
    TokenIds,
    check_first,
)
from edgekit.runtime.engines.gguf import library as llama_library
from edgekit.runtime.engines.gguf.facts import open_checked, stated_context, token_weight_bytes

CHUNK = 512
# Between lfm2-tiny, which one thread decodes faster, and models of 135M, which all of them do.
_SMALL_BYTES = 16 << 20
_ON_GPU: Final = 0  # layers, where the library was built for a GPU
# ggml_repack_get_optimal_repack_type in ggml/src/ggml-cpu/repack.cpp, for AVX2 and for dot products
_REPACKED = {"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"}
_REPACKED_ON_ARM = _REPACKED | {"Q5_K", "Q6_K", "Q8_0"}


class GgufEngine(OneSequenceEngine):
    """A model in the one sequence 0 of a llama.cpp context.

    `context` and what the cache takes are fixed when it is opened. LFM2's state cannot be taken
    back by some tokens, so there is `reset` only.
    """

    name = "gguf"
    version = llama_library.VERSION
    built = llama_library.BUILT

    def __init__(self, path: Path, threads: int | None = None, context: int | None = None) -> None:
        """Check and load a file.

        It gets room for `context` tokens, by default for what it states and at most 2048.
        """
        super().__init__()
        file = open_checked(path)
        self.context = _context(file, context)
        self.longest_chunk = self.default_chunk = min(CHUNK, self.context)
        llama_library.start()
        model = load_model(path, mapped=not _is_repacked(file))
        self.threads = _threads(file, threads)
        handle = llama.llama_init_from_model(model, _context_params(self.context, self.threads))
        if not handle:
            error = llama_library.failure(f"cannot make a context of {self.context} for {path}")
            llama.llama_model_free(model)
            raise error
        self._handle = handle
        self._release = weakref.finalize(self, _free, handle, model)
        vocab = llama.llama_model_get_vocab(model)
        self.vocab_size = llama.llama_vocab_n_tokens(vocab)
        self.eos_ids = end_ids(vocab)
        self._tokens = np.zeros(self.longest_chunk, np.int32)
        self._wanted = np.zeros(self.longest_chunk, np.int8)
        self._batch = _batch(self._tokens)
        self._scoring_batch = _batch(self._tokens, self._wanted)

    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        if position == 0:
            self._clear()
        self._decode(self._batch, tokens, position)
        row: Logits = self._logits(llama.llama_get_logits(self._handle), 1)[0]
        return row

    def score(self, tokens: Sequence[int], first: int) -> Logits:
        """Process tokens from a fresh state; logits `[n - first, vocab_size]`, in whole chunks."""
        check_first(first, len(tokens))
        self.reset()
        ids = self._checked(tokens)
        self._clear()
        found = []
        for begin in range(0, len(ids), self.default_chunk):
            part = ids[begin : begin + self.default_chunk]
            unwanted = min(len(part), max(0, first - begin))
            self._wanted[:unwanted], self._wanted[unwanted:] = 0, 1
            self._decode(self._scoring_batch, part, begin)
            self._position += len(part)
            if rows := len(part) - unwanted:
                found.append(self._logits(llama.llama_get_logits(self._handle), rows))
        return np.concatenate(found)

    def _clear(self) -> None:
        """Forget cache and states; what stands in them is not read again, so it may stay."""
        llama.llama_memory_clear(llama.llama_get_memory(self._handle), False)

    def _decode(self, batch: Any, tokens: TokenIds, position: int) -> None:  # noqa: ANN401
        self._tokens[: len(tokens)] = tokens
        batch.n_tokens = len(tokens)
        status = llama.llama_decode(self._handle, batch)
        if status:
            what = f"failed with status {status} on {len(tokens)} tokens at position {position}"
            raise llama_library.failure(what)

    def _logits(self, pointer: Any, rows: int) -> Logits:  # noqa: ANN401 - a ctypes pointer
        """Copy rows out of memory that the next call writes anew."""
        logits = np.empty((rows, self.vocab_size), np.float32)
        ctypes.memmove(logits.ctypes.data, pointer, logits.nbytes)
        return logits

    def close(self) -> None:
        """Free the model and its state."""
        super().close()
        self._release()


def open_engine(model_path: Path, threads: int | None, context: int | None) -> GgufEngine:
    """Open a `.gguf` file."""
    return GgufEngine(model_path, threads, context)


def load_model(path: Path, *, mapped: bool = True, vocab_only: bool = False) -> Any:  # noqa: ANN401 - a handle
    """Return a handle to the model of a checked file, to be freed by `llama_model_free`."""
    params = llama.llama_model_default_params()
    params.n_gpu_layers = _ON_GPU
    params.load_mode = llama.LLAMA_LOAD_MODE_MMAP if mapped else llama.LLAMA_LOAD_MODE_NONE
    params.vocab_only = vocab_only
    model = llama.llama_model_load_from_file(bytes(path), params)
    if not model:
        raise llama_library.failure(f"cannot load {path}")
    return model


def end_ids(vocab: Any) -> tuple[int, ...]:  # noqa: ANN401 - a handle
    """Return the tokens at which llama.cpp's own programs end a text."""
    ids = range(llama.llama_vocab_n_tokens(vocab))
    return tuple(token for token in ids if llama.llama_vocab_is_eog(vocab, token))


def _is_repacked(file: GgufFile) -> bool:
    """Whether llama.cpp holds most of a file's bytes in another layout on this machine."""
    arm = platform.machine().lower() in ("aarch64", "arm64")
    kinds = _REPACKED_ON_ARM if arm else _REPACKED
    sizes = [(tensor.nbytes, tensor.type in kinds) for tensor in file.tensors.values()]
    return 2 * sum(size for size, repacked in sizes if repacked) > sum(size for size, _ in sizes)


def _context(file: GgufFile, asked: int | None) -> int:
    longest = stated_context(file)
    if asked is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 1 <= asked <= longest:
        raise EdgekitError(f"context must be 1 to {longest} for {file.path}, not {asked}")
    return asked


def _threads(file: GgufFile, asked: int | None) -> Threads:
    """Return a number that was given for both; else one thread for the tokens of a small model."""
    threads = Threads.for_both(asked)
    small = asked is None and token_weight_bytes(file) < _SMALL_BYTES
    return Threads(threads.prompt, 1) if small else threads


def _context_params(context: int, threads: Threads) -> Any:  # noqa: ANN401 - a ctypes structure
    params = llama.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = min(CHUNK, context)
    params.n_threads, params.n_threads_batch = threads.decode, threads.prompt
    params.no_perf = True
    return params


def _batch(tokens: Any, wanted: Any = None) -> Any:  # noqa: ANN401
    """Return a batch over arrays that are filled for each call; without `wanted`, the last row.

    The positions go on from what the memory holds, and the one sequence is 0.
    """
    batch = llama.llama_batch()
    batch.token = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    if wanted is not None:
        batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
    return batch


def _free(handle: Any, model: Any) -> None:  # noqa: ANN401
    llama.llama_free(handle)
    llama.llama_model_free(model)
