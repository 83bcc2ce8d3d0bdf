"""Runs an ONNX decoder in onnxruntime, its states bound once and never copied for a token.

A cache that GroupQueryAttention writes is one buffer of `context` positions, bound as both its
input and its output: the operator then appends in place. The states of convolutions are small and
change places after each run. A graph of plain operators makes a longer cache in each run (Concat);
its output is handed back as the next input as it is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.errors import EdgekitError, one_line
from edgekit.formats.artifact.read import MANIFEST, Artifact
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import GenaiConfig, is_genai_folder
from edgekit.formats.onnx.model import Value
from edgekit.metrics.logits import Logits
from edgekit.runtime.engines.engine import (
    DEFAULT_CONTEXT,
    OneSequenceEngine,
    Threads,
    TokenIds,
    check_first,
)
from edgekit.runtime.engines.onnx.batch import padded_logits
from edgekit.runtime.engines.onnx.graph import Decoder, State, read_decoder

MOST_CONTEXT = 1 << 20
"""Where nothing states a bound."""
DEFAULT_CHUNK = 512
LONGEST_CHUNK = 2048
ALL_ROWS_BYTES = 32 << 20
"""A graph that gives logits for every token gets chunks whose logits are no larger than this."""
_MAX_STATE_BYTES = 16 << 30
_PREAMBLE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from \S+ failed: ?)?")
_SOURCE_LINE = re.compile(r"/onnxruntime_src/\S+:\d+ .*?\) (const )?")
_SILENT = 4  # only fatal errors are logged; what fails is raised, too


class OnnxEngine(OneSequenceEngine):
    """A decoder with the states of LFM2: keys and values, and what its convolutions remember."""

    name = "onnx"
    version = ort.__version__

    def __init__(self, path: Path, threads: int | None = None, context: int | None = None) -> None:
        """Check and load a file; `genai_config.json` and `edgekit.json` beside it are heeded."""
        super().__init__()
        model, config = OnnxFile.open(path), _genai_config(path)
        decoder = read_decoder(model, config)
        self.context = _context(path, config, decoder, context)
        self.vocab_size = decoder.vocab_size
        self.longest_chunk = min(self.context, LONGEST_CHUNK)
        self.default_chunk = min(self.longest_chunk, _default_chunk(decoder))
        self._decoder = decoder
        _check_memory(path, decoder, self.context)
        self.threads = Threads.for_both(threads)
        self._run: _Runner | None = _Runner(
            open_session(path, self.threads.prompt), decoder, self.context
        )

    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        return self._rows(tokens, position, 1).reshape(-1)

    def _rows(self, tokens: TokenIds, position: int, rows: int) -> Logits:
        """Run tokens; logits `[rows, vocab_size]` of the last so many of them."""
        if self._run is None:
            raise EdgekitError("the onnx engine is closed")
        try:
            if position == 0:
                self._run.begin()
            logits = self._run(tokens, position, rows).reshape(-1, self.vocab_size)
            if len(logits) < rows:
                raise ValueError(f"it gives logits for {len(logits)} tokens, not for {rows}")
            # a copy, for the runtime uses that memory again
            return cast(Logits, logits[-rows:].astype(np.float32))
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EdgekitError(
                f"onnxruntime failed on {len(tokens)} tokens at position {position}: "
                f"{_reason(error)}"
            ) from error

    def score(self, tokens: Sequence[int], first: int) -> Logits:
        """Process tokens in chunks where the graph gives logits for every token."""
        if self._decoder.last_row_only:
            return super().score(tokens, first)
        check_first(first, len(tokens))
        self.reset()
        ids = self._checked(tokens)
        found = np.empty((len(ids) - first, self.vocab_size), np.float32)
        for part in np.split(ids, range(self.default_chunk, len(ids), self.default_chunk)):
            end = self._position + len(part)
            wanted = min(len(part), end - first)
            rows = self._rows(part, self._position, max(1, wanted))
            if wanted > 0:
                found[end - first - wanted : end - first] = rows
            self._position = end
        return found

    def padded_logits(
        self, rows: Sequence[Sequence[int]], following: Sequence[int], in_front: bool
    ) -> Logits:
        """Run a batch beside the engine's own sequence, as `batch.py` says."""
        if self._run is None:
            raise EdgekitError("the onnx engine is closed")
        try:
            return padded_logits(self._run.session, self._decoder, rows, following, in_front)
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EdgekitError(
                f"onnxruntime failed on a padded batch of {len(rows)} rows: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Release the model and its states."""
        super().close()
        self._run = None


def open_engine(model_path: Path, threads: int | None, context: int | None = None) -> OnnxEngine:
    """Open an `.onnx` file with room for `context` positions, by default what is stated for it."""
    return OnnxEngine(model_path, threads, context)


class _Runner:
    """A session and the memory of one sequence.

    Two bindings take turns, for what the one writes the other reads; caches that are written in
    place stand in both.
    """

    def __init__(self, session: ort.InferenceSession, decoder: Decoder, context: int) -> None:
        self.session, self._decoder = session, decoder
        self._options = ort.RunOptions()
        self._options.log_severity_level = _SILENT
        self._growing = [s for s in decoder.states if s.counts_positions and not s.in_place]
        self._turning = [(s, (_zeros(s), _zeros(s))) for s in decoder.states if 0 not in s.shape]
        self._in_place = [(s, _zeros(s, context)) for s in decoder.states if s.in_place]
        self._bindings = (self._binding(0), self._binding(1))
        self._tokens = _integers(decoder.tokens, np.zeros(min(context, LONGEST_CHUNK)))
        self._mask = _integers(decoder.mask, np.ones(context))
        self._positions = _integers(decoder.positions, np.arange(context))
        self._wanted = _integers(decoder.rows, np.ones(1))
        self._grown: list[ort.OrtValue] = []
        self._turn = 0

    def _binding(self, turn: int) -> ort.IOBinding:
        """Bind what stays where it is; the outputs keep this order: logits, growing, the rest."""
        binding = self.session.io_binding()
        binding.bind_output(self._decoder.logits, "cpu")
        for state in self._growing:
            binding.bind_output(state.present, "cpu")
        for state, cache in self._in_place:
            binding.bind_ortvalue_input(state.past, cache.value)
            binding.bind_ortvalue_output(state.present, cache.value)
        for state, pair in self._turning:
            binding.bind_ortvalue_input(state.past, pair[turn].value)
            binding.bind_ortvalue_output(state.present, pair[1 - turn].value)
        return binding

    def begin(self) -> None:
        """Forget the sequence; of a cache in place nothing is read before it is written."""
        self._turn = 0
        for _, pair in self._turning:
            pair[0].array.fill(0)
        self._grown = [_zeros(state).value for state in self._growing]

    def __call__(self, tokens: TokenIds, position: int, rows: int) -> NDArray[np.generic]:
        """Run tokens at a position; all logits that the graph gives, until the next call."""
        binding, count = self._bindings[self._turn], len(tokens)
        end = position + count
        self._tokens[:count] = tokens
        self._wanted[:] = rows
        _bind(binding, self._decoder.tokens, self._tokens[:count])
        _bind(binding, self._decoder.mask, self._mask[:end])
        _bind(binding, self._decoder.positions, self._positions[position:end])
        _bind(binding, self._decoder.rows, self._wanted)
        binding.bind_output(self._decoder.logits, "cpu")
        for state, value in zip(self._growing, self._grown, strict=True):
            binding.bind_ortvalue_input(state.past, value)
            binding.bind_output(state.present, "cpu")
        self.session.run_with_iobinding(binding, self._options)
        self._turn = 1 - self._turn
        if self._growing:
            self._grown = binding.get_outputs()[1 : 1 + len(self._growing)]
        logits: NDArray[np.generic] = np.from_dlpack(binding.get_outputs_as_ortvaluevector()[0])
        return logits


@dataclass(frozen=True)
class _Cache:
    """Memory of ours that onnxruntime reads and writes."""

    array: NDArray[np.generic]
    value: ort.OrtValue


def _zeros(state: State, positions: int = 0) -> _Cache:
    """Return zeros of a state's shape; the system gives a page only where one is written."""
    array = np.zeros(state.sized(positions), np.dtype(state.dtype))
    return _Cache(array, ort.OrtValue.ortvalue_from_numpy(array))


def _integers(value: Value | None, numbers: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return numbers in the type that an input takes."""
    return numbers.astype(np.int64 if value is None else value.dtype)


def _bind(binding: ort.IOBinding, value: Value | None, numbers: NDArray[np.generic]) -> None:
    """Bind numbers by their address to an input of any rank, if there is such an input."""
    if value is not None:
        shape = [1] * (len(value.shape or ()) - 1) + [len(numbers)] if value.shape else []
        binding.bind_input(value.name, "cpu", 0, numbers.dtype, shape, numbers.ctypes.data)


def open_session(path: Path, threads: int, exact_bytes: bool = False) -> ort.InferenceSession:
    """Open a model as onnxruntime-genai does (src/models/model.cpp): its defaults, our threads.

    So idle threads spin for a while, then sleep. Beside a loop on each CPU a third of lfm2-tiny's
    decoding speed is left (`benchmarks/beside_load.py`); shorter spins changed little, and no spin
    at all made it slower on quiet CPUs. genai itself takes half the CPUs where it is not told.
    `exact_bytes`: without integer dot products a CPU's products of unsigned by signed bytes
    saturate 16 bits; there alone, multiply by slower exact ones.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _SILENT
    if exact_bytes:  # onnxruntime_session_options_config_keys.h
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of onnxruntime share no other base
        raise EdgekitError(f"onnxruntime cannot load {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what onnxruntime says of the cause, without its codes, calls and source lines."""
    text = _PREAMBLE.sub("", one_line(error, limit=5000))
    for start in ("Status Message: ", "This is an invalid model. ", ", Error "):
        text = text.rpartition(start)[2]
    return _SOURCE_LINE.sub("", text)[:200]


def _genai_config(path: Path) -> GenaiConfig | None:
    """Return the description beside a file where it is of this file."""
    if not is_genai_folder(path.parent):
        return None
    config = GenaiConfig.open(path.parent)
    return config if config.model_path.name == path.name else None


def _context(path: Path, config: GenaiConfig | None, decoder: Decoder, wanted: int | None) -> int:
    """Return the positions to make room for, at most what graph, folder and artifact allow."""
    artifact = _artifact(path)
    stated = (artifact and artifact.context, config and config.context, decoder.most_positions)
    most = min((limit for limit in stated if limit), default=MOST_CONTEXT)
    if wanted is None:
        return most if artifact else min(most, DEFAULT_CONTEXT)
    if not 1 <= wanted <= most:
        raise EdgekitError(f"context must be 1 to {most} for {path}, not {wanted}")
    return wanted


def _artifact(path: Path) -> Artifact | None:
    """Return the artifact that a file belongs to: it lies in its folder or in one below."""
    folders = (path.parent, path.parent.parent)
    return next((Artifact.open(each) for each in folders if (each / MANIFEST).is_file()), None)


def _default_chunk(decoder: Decoder) -> int:
    if decoder.last_row_only or decoder.rows is not None:
        return DEFAULT_CHUNK
    return min(DEFAULT_CHUNK, max(1, ALL_ROWS_BYTES // (4 * decoder.vocab_size)))


def _check_memory(path: Path, decoder: Decoder, context: int) -> None:
    sizes = [prod(s.sized(context)) * np.dtype(s.dtype).itemsize for s in decoder.states]
    if sum(sizes) > _MAX_STATE_BYTES:
        raise EdgekitError(
            f"{path}: its states would take {sum(sizes) / 1e9:.0f} GB at a context of {context}"
        )
