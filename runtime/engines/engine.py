"""What every engine offers, what every engine checks, and how one is opened by name."""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from edgekit.common.install import install_command
from edgekit.common.last_words import NO_ENGINE, engine_at_work, engine_on, engine_works
from edgekit.common.plural import counted
from edgekit.devices.cpus import default_threads, share_cpus_well
from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits
from edgekit.runtime.engines.first_load import check_first_load
from edgekit.runtime.engines.registry import ENGINES

TokenIds = NDArray[np.int64]

DEFAULT_CONTEXT = 2048
"""Context length where a file states none, capped at the model's own."""
THREADS_PER_CPU = 4

# Where a module's name is not what one installs.
_DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python"}


@dataclass(frozen=True)
class Threads:
    """CPU threads of an open engine: for several tokens of a prompt at once, and for one token."""

    prompt: int
    decode: int

    @classmethod
    def for_both(cls, asked: int | None) -> Self:
        """Return the number that was asked for, or `default_threads()`, for both."""
        count = asked or default_threads()
        return cls(count, count)


class Engine(AbstractContextManager["Engine", None], Protocol):
    """One loaded model and the state of one sequence; a `with` block closes it.

    `name` and `version` are the engine's, `context` is the number of positions its state holds,
    `position` the number of tokens processed since the last reset; one forward pass can take
    `longest_chunk` tokens and is fastest with `default_chunk`. `eos_ids` are the tokens that end a
    text by what the file itself says, none where it does not say. `threads` are those that it uses.
    `built` is what an engine that was compiled for this machine says of that. The logits returned
    are the caller's own: no later call changes them.
    """

    name: str
    version: str
    context: int
    vocab_size: int
    longest_chunk: int
    default_chunk: int
    eos_ids: tuple[int, ...]
    threads: Threads
    built: str | None

    @property
    def position(self) -> int:
        """Number of tokens processed since the last reset."""
        ...

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        """Process tokens after those already processed; logits `[vocab_size]` of the last one.

        `chunk` is the number of tokens in one forward pass, by default `default_chunk`.
        """
        ...

    def decode(self, token: int) -> Logits:
        """Process one token; logits `[vocab_size]`."""
        ...

    def score(self, tokens: Sequence[int], first: int) -> Logits:
        """Process tokens from a fresh state; logits `[n - first, vocab_size]`.

        Row i is what follows `tokens[first + i]`.
        """
        ...

    def reset(self) -> None:
        """Forget every token; the next prefill starts a new sequence."""
        ...

    def close(self) -> None:
        """Release the model; the engine cannot be used afterwards."""
        ...


class OneSequenceEngine(ABC):
    """The part of an engine that is the same everywhere: checks, chunks, the position."""

    name: str
    version: str
    context: int
    vocab_size: int
    longest_chunk: int
    default_chunk: int
    threads: Threads
    eos_ids: tuple[int, ...] = ()
    built: str | None = None

    def __init__(self) -> None:
        """Start an open engine at position 0; the subclass sets the attributes above."""
        self._position = 0
        self._open = True
        self._number = engine_at_work()

    @abstractmethod
    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        """Run `1 <= n <= longest_chunk` checked tokens that start at `position`."""

    @property
    def position(self) -> int:
        """Number of tokens processed since the last reset."""
        return self._position

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Logits:
        """Process tokens after those already processed; logits `[vocab_size]` of the last one.

        Raises `EdgekitError` before any work when there are no tokens, one is outside the
        vocabulary or they do not fit the context.
        """
        ids = self._checked(tokens)
        size = min(chunk or self.default_chunk, self.longest_chunk)
        for begin in range(0, len(ids), size):
            part = ids[begin : begin + size]
            logits = self._forward(part, self._position)
            self._position += len(part)
        return logits

    def decode(self, token: int) -> Logits:
        """Process one token; logits `[vocab_size]`."""
        return self.prefill((token,))

    def score(self, tokens: Sequence[int], first: int) -> Logits:
        """Process tokens from a fresh state; logits `[n - first, vocab_size]`.

        Row i is what follows `tokens[first + i]`. An engine that gives one row a call decodes
        the rows after the first one by one; the state afterwards is that after all tokens.
        """
        check_first(first, len(tokens))
        self.reset()
        rows = np.empty((len(tokens) - first, self.vocab_size), np.float32)
        rows[0] = self.prefill(tokens[: first + 1])
        for row, token in zip(rows[1:], tokens[first + 1 :], strict=True):
            row[:] = self.decode(token)
        return rows

    def _checked(self, tokens: Sequence[int]) -> TokenIds:
        """Return the ids of tokens that can be processed now."""
        if not self._open:
            raise EdgekitError(f"the {self.name} engine is closed")
        engine_works(self._number)
        return check_tokens(tokens, self._position, self.context, self.vocab_size)

    def reset(self) -> None:
        """Forget every token: a model's state starts anew whenever it is run at position 0."""
        self._position = 0

    def close(self) -> None:
        """Release the model; the engine cannot be used afterwards."""
        self._open = False
        engine_works(NO_ENGINE)

    def __enter__(self) -> Self:
        """Return the engine, which the `with` block closes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()


class EngineMissing(EdgekitError):
    """The runtime of an engine is not installed; the message says how to install it."""


def import_engine(name: str) -> ModuleType:
    """Import the engine of that name: `open_engine(model_path, threads, context) -> Engine`.

    EdgekitError for an unknown name; EngineMissing where its runtime is not installed.

    EngineCrash where its library does not survive a first load, which is tried elsewhere.
    """
    module = ENGINES.find(name, "decoder")
    share_cpus_well()
    check_first_load(name)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "edgekit":
            raise
        needed = _DISTRIBUTIONS.get(package, package)
        raise EngineMissing(f"the {name} engine needs {needed}: {install_command(name)}") from error


def load_engine(
    name: str, model_path: Path, threads: int | None = None, context: int | None = None
) -> Engine:
    """Open a model file in the engine of that name.

    `threads` is a number for everything; by default an engine takes `default_threads()` or, for
    decoding, what is better for the model (`Engine.threads` says).
    `context` is the number of positions to make room for where the file leaves that open (GGUF,
    ONNX), by default what the file states, at most 2048. Raises `EdgekitError` for an unknown
    engine or one that is not installed, an impossible number of threads, or a file that the
    engine refuses.
    """
    check_threads(threads)
    module = import_engine(name)
    with engine_on(name, Path(model_path)):
        return cast(Engine, module.open_engine(Path(model_path), threads, context))


def check_threads(threads: int | None, cpus: int | None = None) -> None:
    """Refuse numbers of threads that no engine runs well with, and that some crash at.

    Beyond one per CPU they only get in each other's way; a few more may be asked for to see it.
    `cpus` are those of the machine that is meant, by default this one.
    """
    most = THREADS_PER_CPU * (cpus or os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        wanted = "at least 1" if threads < 1 else f"at most {most} ({THREADS_PER_CPU} per CPU)"
        raise EdgekitError(f"threads must be {wanted}, not {threads}")


def check_tokens(tokens: Sequence[int], position: int, context: int, vocab_size: int) -> TokenIds:
    """Return the ids as an array; raise `EdgekitError` where the engine cannot process them."""
    count = len(tokens)
    if count == 0:
        raise EdgekitError("the prompt holds no token")
    if position + count > context:
        raise EdgekitError(_does_not_fit(count, position, context))
    if count == 1 and type(tokens[0]) is int:  # decoding: what follows takes microseconds there
        _check_range(tokens[0], vocab_size)
        return np.array(tokens, np.int64)
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise EdgekitError("token ids must be a flat sequence of integers")
    for extreme in (int(ids.min()), int(ids.max())):
        _check_range(extreme, vocab_size)
    return ids.astype(np.int64, copy=False)


def _check_range(token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise EdgekitError(f"token id {token} is outside the vocabulary of {vocab_size}")


def check_first(first: int, count: int) -> None:
    """Refuse a first row that `count` tokens do not have."""
    if not 0 <= first < count:
        raise EdgekitError(f"the first position to score must be 0 to {count - 1}, not {first}")


def _does_not_fit(count: int, position: int, context: int) -> str:
    if position == 0:
        return f"prompt of {counted(count, 'token')} does not fit the context of {context}"
    tokens = counted(count, "token")
    return f"{tokens} after the {position} processed do not fit the context of {context}"
