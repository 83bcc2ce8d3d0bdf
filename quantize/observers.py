"""Observers: the range of one activation over mini-batches (arXiv 1806.08342, section 3.1.1).

Each gives one affine range per layer. `moving-average`, the whitepaper's and the default: minimum
and maximum of each mini-batch, averaged. `percentile` cuts the same share off both ends of the
histogram, `mse` takes the range whose 8-bit codes have the least squared error over it.

Scales of activations are full float32 numbers, unlike those of weights: a weight's scale is stored
with its codes in formats that hold bfloat16 or float16, an activation's is one float32 of the
graph in every engine. Rounding it would also widen each range by up to 1 part in 128 and give
small activations the smallest float16 as scale.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError

ObserverMethod = Literal["moving-average", "percentile", "mse"]
OBSERVER_METHODS: tuple[ObserverMethod, ...] = get_args(ObserverMethod)

AVERAGING = 0.01
"""Weight of a new mini-batch once a hundred have been seen; before, all count alike."""
PERCENTILE = 99.99
"""Per cent of the values below the range's end; the same share is cut off at its start."""
BINS = 2048
"""Bins on each side of 0."""
_SHRINK_STEPS = 40
LEVELS = 256
SCALE_OF_ZERO = 2.0**-7
"""Scale of a value that is always 0, for which any would do: near to what others have, since
XNNPACK bounds the ratios of scales."""


@dataclass(frozen=True)
class ActivationParameters:
    """`x = (code - zero_point) * scale` with codes 0 to 255; `scale` is a float32 number."""

    scale: float
    zero_point: int

    def fake_quantize(self, values: Tensor) -> Tensor:
        """Return what the codes of float32 values stand for, ties rounded to even."""
        codes = (values / self.scale).round_().add_(self.zero_point).clamp_(0, LEVELS - 1)
        return codes.sub_(self.zero_point).mul_(self.scale)

    def codes(self, values: Tensor) -> Tensor:
        """Return the codes of float32 values, uint8."""
        steps = (values / self.scale).round_().add_(self.zero_point)
        return steps.clamp_(0, LEVELS - 1).to(torch.uint8)


def activation_parameters(
    least: float, most: float, reciprocal: bool = False
) -> ActivationParameters:
    """Return the parameters that cover [least, most] and 0, by `ranges.from_range`'s formulas.

    `D = (most - least) / 255` and `z = round(-least / D)`; of one value, a constant, D is its
    magnitude, so that it has a code exactly. With `reciprocal` D is the next 1/n above, n whole.
    ValueError where the range is not finite or too small for a float32 scale.
    """
    if least == most == 0:
        return ActivationParameters(SCALE_OF_ZERO, 0)
    if least == most and math.isfinite(least):
        scale = float(torch.tensor(abs(least), dtype=torch.float32))
        if scale >= torch.finfo(torch.float32).tiny:
            return ActivationParameters(scale, int(least < 0))
    least, most = min(least, 0.0), max(most, 0.0)
    scale = float(torch.tensor((most - least) / (LEVELS - 1), dtype=torch.float32))
    if not (torch.finfo(torch.float32).tiny <= scale < math.inf):  # also false for NaN
        raise ValueError(f"a range of [{least:g}, {most:g}] has no usable scale")
    if reciprocal:
        scale = _reciprocal_above(scale)
    return ActivationParameters(scale, min(max(round(-least / scale), 0), LEVELS - 1))


def _reciprocal_above(scale: float) -> float:
    """Return the smallest 1/n above a scale whose reciprocal in float32 is n again."""
    n = int(1 / scale)
    while n > 1 and np.float32(1) / np.float32(1 / n) != n:
        n -= 1
    return float(np.float32(1 / n)) if n else scale


class Observer(Protocol):
    """What calibration tells one tensor's values."""

    def observe(self, values: Tensor, begins: bool = True) -> None:
        """Take values of a mini-batch, any shape; EdgekitError for infinities and NaN.

        Where the mini-batch comes in parts, `begins` is true for its first one only.
        """
        ...

    def range(self) -> tuple[float, float]:
        """Return minimum and maximum; EdgekitError where nothing was seen."""
        ...


def observer(method: str) -> Observer:
    """Return a new observer; EdgekitError for an unknown method."""
    if method == "moving-average":
        return MovingAverage()
    if method in ("percentile", "mse"):
        return Histogram(method)
    raise EdgekitError(
        f"unknown calibration method {method!r:.60}: allowed are {', '.join(OBSERVER_METHODS)}"
    )


class MovingAverage:
    """The moving average of each mini-batch's minimum and maximum."""

    def __init__(self) -> None:
        self._seen = 0
        self._least = self._most = 0.0
        self._before = self._batch = (0.0, 0.0)
        self._extremes = _Extremes()

    def observe(self, values: Tensor, begins: bool = True) -> None:
        """Take the values of one mini-batch, or of a part of it."""
        least, most = self._extremes.take(values)
        if begins:
            self._seen += 1
            self._before = (self._least, self._most)
        else:
            least, most = min(least, self._batch[0]), max(most, self._batch[1])
        self._batch = (least, most)
        # A plain mean at first: with the final weight alone, the first of ten mini-batches
        # would decide the range.
        share = max(1 / self._seen, AVERAGING)
        self._least = self._before[0] + share * (least - self._before[0])
        self._most = self._before[1] + share * (most - self._before[1])

    def range(self) -> tuple[float, float]:
        """Return the averaged minimum and maximum."""
        self._extremes.check()
        if self._least == self._most:  # of one value in each mini-batch, not always the same
            return self._extremes.least, self._extremes.most
        return self._least, self._most

    @property
    def seen(self) -> int:
        """Return how many mini-batches were observed."""
        return self._seen

    def state(self) -> list[float]:
        """Return all that `restore` needs to go on: finite numbers, zeros before any mini-batch."""
        if not self._seen:
            return [0.0] * 5
        return [
            self._seen,
            self._least,
            self._most,
            self._extremes.least,
            self._extremes.most,
        ]

    def restore(self, state: list[float]) -> None:
        """Go on from what `state` returned, or from an average of several such states."""
        seen, self._least, self._most, least, most = state
        self._seen = max(round(seen), int(seen > 0))
        self._extremes = _Extremes()
        if self._seen:
            self._extremes.least, self._extremes.most = least, most


class Histogram:
    """A histogram that grows with what it sees, and the range read from it at the end.

    Its bins start at 0 and their width is a power of two, doubled by merging pairs, so that the
    counts do not depend on the order of the mini-batches once the widest was seen.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._counts = torch.zeros(2 * BINS, dtype=torch.float64)
        self._exponent: int | None = None
        self._extremes = _Extremes()

    def observe(self, values: Tensor, begins: bool = True) -> None:
        """Take the values of one mini-batch, or of a part of it."""
        least, most = self._extremes.take(values)
        largest = max(-least, most)
        if largest > 0:
            self._widen(math.frexp(largest)[1] - int(math.log2(BINS)))
        if self._exponent is None:  # zeros so far, which any bin width holds
            self._widen(-100)
        assert self._exponent is not None
        steps = (values.detach().double() * 2.0**-self._exponent).floor_()
        bins = (steps.flatten() + BINS).clamp_(0, 2 * BINS - 1).long()
        self._counts += torch.bincount(bins, minlength=2 * BINS)

    def range(self) -> tuple[float, float]:
        """Return the range of the method, never wider than what was seen."""
        self._extremes.check()
        if self._extremes.least == self._extremes.most:
            return self._extremes.least, self._extremes.most
        low, high = self._percentiles() if self._method == "percentile" else self._least_error()
        low, high = max(low, self._extremes.least), min(high, self._extremes.most)
        # Where nearly all is 0, a cut can leave nothing.
        return (low, high) if high > low else (self._extremes.least, self._extremes.most)

    def _widen(self, exponent: int) -> None:
        """Merge bins until their width is 2**exponent."""
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            pairs = self._counts.view(-1, 2).sum(dim=1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[BINS // 2 : BINS // 2 + BINS] = pairs
            self._exponent += 1

    def _edges(self) -> Tensor:
        assert self._exponent is not None
        return torch.arange(-BINS, BINS + 1, dtype=torch.float64) * 2.0**self._exponent

    def _percentiles(self) -> tuple[float, float]:
        cut = (1 - PERCENTILE / 100) * self._counts.sum()
        edges = self._edges()
        low = int((self._counts.cumsum(0) <= cut).sum())
        high = int((self._counts.flip(0).cumsum(0) <= cut).sum())
        return float(edges[low]), float(edges[2 * BINS - high])

    def _least_error(self) -> tuple[float, float]:
        """Try every pair of shrunk ends: 40 by 40 ranges."""
        edges = self._edges()
        held = self._counts > 0
        centres, counts = ((edges[1:] + edges[:-1]) / 2)[held], self._counts[held]
        best = (math.inf, self._extremes.least, self._extremes.most)
        shares = torch.linspace(1, 1 / _SHRINK_STEPS, _SHRINK_STEPS, dtype=torch.float64)
        tops = shares * max(self._extremes.most, 0.0)
        for low in (shares * min(self._extremes.least, 0.0)).unique():
            scale = ((tops - low) / (LEVELS - 1))[:, None]
            usable = scale[:, 0] > 0
            zero = (-low / scale).round()
            codes = (centres / scale + zero).round().clamp(0, LEVELS - 1)
            errors = (((codes - zero) * scale - centres).square() * counts).sum(dim=1)
            errors[~usable] = math.inf
            where = int(errors.argmin())
            best = min(best, (float(errors[where]), float(low), float(tops[where])))
        return best[1], best[2]


class _Extremes:
    """The least and the largest value ever seen; what cannot be calibrated with is refused."""

    def __init__(self) -> None:
        self.least, self.most = math.inf, -math.inf

    def take(self, values: Tensor) -> tuple[float, float]:
        if values.numel() == 0:
            raise EdgekitError("is empty")
        least, most = (float(value) for value in torch.aminmax(values.detach()))
        if not (math.isfinite(least) and math.isfinite(most)):
            raise EdgekitError("holds infinities or NaN")
        self.least, self.most = min(self.least, least), max(self.most, most)
        return least, most

    def check(self) -> None:
        if self.least > self.most:
            raise EdgekitError("was never seen")
