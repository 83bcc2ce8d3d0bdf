"""Choosing the next token from logits.

The filters run in the order of llama.cpp's common sampler: repetition penalty, top-k, top-p,
min-p, and the temperature last, so that it changes how boldly one chooses among the survivors
and not who survives. (transformers applies the temperature before the filters.)
"""

import math
import secrets
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token; the defaults are those Liquid AI recommends for LFM2.

    `temperature` 0 takes the most probable token. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repeat_penalty` 1 switch a filter off. The penalty falls on the tokens of the last
    `repeat_last_n`. `seed` None draws a fresh one.
    """

    temperature: float = 0.3
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.15
    repeat_penalty: float = 1.05
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raise `EdgekitError` for a setting out of its range."""
        _demand(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 (greedy) or more",
        )
        _demand(self.top_k >= 0, "top-k", self.top_k, "0 (off) or more")
        _demand(0 < self.top_p <= 1, "top-p", self.top_p, "above 0, and 1 (off) at most")
        _demand(0 <= self.min_p <= 1, "min-p", self.min_p, "0 (off) to 1")
        _demand(
            0.01 <= self.repeat_penalty <= 100,  # logits times or over it stay finite
            "repeat-penalty",
            self.repeat_penalty,
            "0.01 to 100; 1 is off",
        )
        _demand(self.repeat_last_n >= 0, "repeat-last-n", self.repeat_last_n, "0 (off) or more")
        _demand(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "0 to 2^64 - 1")


def _demand(holds: bool, name: str, given: object, allowed: str) -> None:
    if not holds:
        raise EdgekitError(f"{name} must be {allowed}, not {given}")


class Sampler:
    """Draws tokens under `SamplingParams`; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams, context: Iterable[int] = ()) -> None:
        """Start after the tokens of `context`, which count for the repetition penalty."""
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._recent = deque(context, maxlen=params.repeat_last_n)

    def sample(self, logits: Logits) -> int:
        """Choose a token from logits `[vocab]` and remember it for the penalty.

        Raises `EdgekitError` when the logits are not a distribution (NaN, infinity, all -inf).
        """
        check_logits(logits)
        logits = penalize(logits, set(self._recent), self.params.repeat_penalty)
        token = int(logits.argmax()) if self.params.temperature == 0 else self._draw(logits)
        self._recent.append(token)
        return token

    def _draw(self, logits: Logits) -> int:
        ids = survivors(logits, self.params)
        spread = logits[ids].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature sends the others to -inf: right
            weights = np.exp((spread - spread.max()) / self.params.temperature)
        reached = np.cumsum(weights)
        place = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])


def check_logits(logits: Logits) -> None:
    """Raise `EdgekitError` unless some logit is finite and none is NaN or +infinity."""
    if np.isfinite(logits.max()):  # the maximum is NaN when any entry is
        return
    count = int(np.isnan(logits).sum())
    kind = f"{count} NaN among its logits" if count else f"a largest logit of {logits.max()}"
    raise EdgekitError(f"the model returned {kind}: its weights or its file are damaged")


def penalize(logits: Logits, tokens: Collection[int], penalty: float) -> Logits:
    """Divide the positive and multiply the negative logits of `tokens` by `penalty`.

    Source: CTRL, arXiv 1909.05858, section 4.1, in the form every engine uses since negative
    logits were noticed. The argument is left as it is.
    """
    if penalty == 1 or not tokens:
        return logits
    ids = np.fromiter(tokens, dtype=np.int64, count=len(tokens))
    logits = logits.copy()
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def survivors(logits: Logits, params: SamplingParams) -> NDArray[np.int64]:
    """Ids that pass top-k, then top-p among these, then min-p; never none, in rising order."""
    ids: NDArray[np.int64] | None = None  # all; passes over 65,536 entries are worth sparing
    for keep, setting, off in (
        (top_k, params.top_k, 0),
        (top_p, params.top_p, 1),
        (min_p, params.min_p, 0),
    ):
        if setting != off:
            places = keep(logits if ids is None else logits[ids], setting)
            ids = places if ids is None else ids[places]
    return np.arange(len(logits)) if ids is None else ids


def top_k(logits: Logits, k: float) -> NDArray[np.int64]:
    """Places of the `k` largest logits, and of those equal to the smallest of them."""
    return np.flatnonzero(logits >= _largest(logits, min(int(k), len(logits)))[0])


def top_p(logits: Logits, p: float) -> NDArray[np.int64]:
    """Places of the fewest most probable entries whose probabilities reach `p`.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1. Entries equal to the last one stay,
    too. Only as many of the largest are sorted as are needed: a few hundred of 65,536 hold nearly
    all the mass.
    """
    largest = logits.max()
    needed = p * np.exp(logits - largest).sum(dtype=np.float64)
    size = 64
    while True:
        size = min(size * 8, len(logits))
        falling = -np.sort(-_largest(logits, size))
        reached = np.cumsum(np.exp(falling - largest), dtype=np.float64)
        if reached[-1] >= needed or size == len(logits):
            last = min(int(np.searchsorted(reached, needed, side="left")), size - 1)
            return np.flatnonzero(logits >= falling[last])


def min_p(logits: Logits, p: float) -> NDArray[np.int64]:
    """Places whose probability is at least `p` times the largest (arXiv 2407.01082, section 3)."""
    return np.flatnonzero(logits >= logits.max() + np.float32(math.log(p)))


def _largest(logits: Logits, n: int) -> Logits:
    """Return the `n` largest logits, the smallest of them first."""
    return np.partition(logits, len(logits) - n)[len(logits) - n :]
