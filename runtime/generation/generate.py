"""Text generation over any engine: prefill, then sample and decode token by token."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter_ns
from typing import Any, Literal

from edgekit.common.plural import counted
from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits
from edgekit.models.tokenizer import TextTokenizer
from edgekit.runtime.engines.engine import Engine, check_tokens
from edgekit.runtime.generation.sampling import Sampler, SamplingParams

Reason = Literal["eos", "stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, why it ended and how long it took.

    `text` is what was streamed, without the stop string. `cached_tokens` of the prompt were in
    the engine already. `ttft_ns` runs from the first token of the prompt entering the engine to
    the first token sampled; `decode_ns` covers the `decode_steps` after it, sampling included and
    the reader's own time (a slow terminal) excluded.
    """

    text: str
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_ns: int
    decode_steps: int
    decode_ns: int
    seed: int

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second, None when nothing was sampled."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.ttft_ns)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first, None when there was no second."""
        return _rate(self.decode_steps, self.decode_ns)

    def summary(self) -> str:
        """Return the figures and the reason of the end in one line."""
        cached = f" ({self.cached_tokens} of them kept)" if self.cached_tokens else ""
        return (
            f"prompt {counted(self.prompt_tokens, 'token')}{cached} at "
            f"{_shown(self.prefill_rate)}, first token after {self.ttft_ns / 1e6:.0f} ms; "
            f"{counted(self.generated_tokens, 'token')} at {_shown(self.decode_rate)}; "
            f"{_ENDS[self.reason]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the two rates."""
        rates = {
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }
        return asdict(self) | rates


_ENDS: dict[Reason, str] = {
    "eos": "ended by the model",
    "stop": "ended at a stop string",
    "length": "ended at the limit of tokens",
    "context": "ended because the context is full",
    "interrupted": "interrupted",
}


def _shown(rate: float | None) -> str:
    return "- tok/s" if rate is None else f"{rate:.1f} tok/s"


def _rate(count: int, elapsed_ns: int) -> float | None:
    return count * 1e9 / elapsed_ns if count and elapsed_ns else None


def generate(
    engine: Engine,
    tokenizer: TextTokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    max_tokens: int | None = None,
    stop_strings: Sequence[str] = (),
    eos_ids: Collection[int] = (),
) -> "Generation":
    """Prepare a generation; iterate over it for the text, then ask it for its `result()`.

    The engine must hold the first `engine.position` ids of the prompt, so a fresh or reset one
    holds none of them. Without `max_tokens` it ends at an id of `eos_ids`, at a stop string or
    where the context is full.

    Raises `EdgekitError` when the prompt is empty, does not fit the context or is not longer than
    what the engine holds, and for a `max_tokens` below 1 or an empty stop string.
    """
    check_tokens(prompt_ids, 0, engine.context, engine.vocab_size)
    if engine.position >= len(prompt_ids):
        raise EdgekitError(
            f"the engine holds {engine.position} tokens, so a prompt of {len(prompt_ids)} "
            "cannot continue it; reset it first"
        )
    if max_tokens is not None and max_tokens < 1:
        raise EdgekitError(f"max-tokens must be at least 1, not {max_tokens}")
    sampler = Sampler(params, prompt_ids)
    return Generation(
        engine, tokenizer, prompt_ids, sampler, max_tokens, StopScanner(stop_strings), eos_ids
    )


class Generation:
    """One generation under way; iterating yields non-empty pieces of text as they are certain."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        prompt_ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int | None,
        scanner: "StopScanner",
        eos_ids: Collection[int],
    ) -> None:
        """Take checked arguments; `generate` makes one."""
        self.tokens: list[int] = []
        self._engine = engine
        self._stream = tokenizer.stream()
        self._prompt = list(prompt_ids)
        self._cached = engine.position
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._scanner = scanner
        self._eos_ids = frozenset(eos_ids)
        self._text: list[str] = []
        self._reason: Reason = "interrupted"
        self._ttft_ns = self._decode_ns = self._decode_steps = 0

    def __iter__(self) -> Iterator[str]:
        """Generate; works once."""
        for piece in self._pieces():
            if piece:
                self._text.append(piece)
                yield piece

    @property
    def processed(self) -> list[int]:
        """Ids that the engine holds, as long as it is not used for anything else."""
        return (self._prompt + self.tokens)[: self._engine.position]

    def result(self) -> GenerationResult:
        """Return the outcome so far; its reason is "interrupted" until the text has ended."""
        return GenerationResult(
            text="".join(self._text),
            reason=self._reason,
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            generated_tokens=len(self.tokens),
            ttft_ns=self._ttft_ns,
            decode_steps=self._decode_steps,
            decode_ns=self._decode_ns,
            seed=self._sampler.seed,
        )

    def _pieces(self) -> Iterator[str]:
        token = self._first_token()
        while True:
            if token in self._eos_ids:
                reason: Reason = "eos"
                break
            self.tokens.append(token)
            yield self._scanner.push(self._stream.push(token))
            limit = self._limit()
            if limit:
                reason = limit
                break
            token = self._next_token(token)
        yield from self._ending()
        self._reason = "stop" if self._scanner.found else reason

    def _ending(self) -> Iterator[str]:
        """Bytes of an unfinished character, and text withheld for a stop string that never came."""
        if not self._scanner.found:
            yield self._scanner.push(self._stream.flush())
        if not self._scanner.found:
            yield self._scanner.flush()

    def _limit(self) -> Reason | None:
        if self._scanner.found:
            return "stop"
        if len(self.tokens) == self._max_tokens:
            return "length"
        return "context" if self._engine.position >= self._engine.context else None

    def _first_token(self) -> int:
        started = perf_counter_ns()
        token = self._sample(self._engine.prefill(self._prompt[self._cached :]))
        self._ttft_ns = perf_counter_ns() - started
        return token

    def _next_token(self, token: int) -> int:
        started = perf_counter_ns()
        following = self._sample(self._engine.decode(token))
        self._decode_ns += perf_counter_ns() - started
        self._decode_steps += 1
        return following

    def _sample(self, logits: Logits) -> int:
        return self._sampler.sample(logits)


class StopScanner:
    """Finds stop strings in text that arrives in pieces of any size.

    Of several occurrences the one that ends first counts, so the pieces' borders do not matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of `stops`, none of which may be empty."""
        if "" in stops:
            raise EdgekitError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return what can no longer belong to a stop string."""
        self._held += text
        hits = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(place + len(stop), place) for place, stop in hits if place >= 0]
        if ends:
            self.found = True
            certain, self._held = self._held[: min(ends)[1]], ""
            return certain
        return self._release(self._possible_start())

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        border = len(self._held) - keep
        certain, self._held = self._held[:border], self._held[border:]
        return certain

    def _possible_start(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
