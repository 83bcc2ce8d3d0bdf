"""Learning a codebook and which of its entries each weight takes, together, by gradient.

A reconstruction of JLCM (Yvinec, Dapogny, Bailly, arXiv 2309.17361), of which no hyper-parameters
are public. Each weight has three logits, for the entry that k-means gave it and its neighbours in
the ascending codebook; at either end for the three entries there. What is multiplied with is the
entry of the greatest logit; gradients pass straight through to the soft choice
`w^ = sum_j p_j C_j`, `p = softmax(logits / temperature)`:

    ordinary    dw^/dI_j = p_j (C_j - w^)
    proximal    dw^/dI_j = p_j sign(C_j - w^) / (|C_j - w^| + eps)

The ordinary gradient is the derivative of the softmax and grows with the distance of an entry; the
proximal one, the method's, decreases with it. Entries and scales have their true gradients. The
loss is the error of the layer's output (`edgekit.quantize.codebook.output`), which is quadratic in
the weight: its gradient is exact over the whole calibration, in one product with the Hessian.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from edgekit.quantize.codebook.output import OutputError
from edgekit.quantize.codebook.snap import LARGEST, snap
from edgekit.quantize.scales import SCALES, SMALLEST_SCALE
from edgekit.quantize.tensor import QuantizedTensor, as_rows

Gradient = Literal["ordinary", "proximal"]

_BETAS = (0.9, 0.999)
_TINY = 1e-12


@dataclass(frozen=True)
class Learning:
    """How codebooks are learned; the defaults were found on lfm2-tiny.

    steps        of Adam, whose step sizes fall to 0 along half a cosine
    logits       step size of the logits
    codebook     step size of entries, in units of the largest that can be stored
    scales       step size of scales' logarithms
    temperature  of the softmax at the first step and the last, along a geometric series
    sharpness    how much likelier at first is the nearest entry than one a codebook's step further
    eps          of the proximal gradient, in units of the codebook's step
    """

    gradient: Gradient = "proximal"
    steps: int = 60
    logits: float = 0.01
    codebook: float = 1e-3
    scales: float = 1e-3
    temperature: tuple[float, float] = (1.0, 0.2)
    sharpness: float = 2.0
    eps: float = 0.1


def learn(
    weight: Tensor,
    start: QuantizedTensor,
    error: OutputError,
    learning: Learning,
    fixed: bool = False,
) -> QuantizedTensor:
    """Return codebooks, scales and indices learned from those of `start`, made of `weight`.

    With `fixed` codebooks stay as they are. The result is on the grids that are stored.
    Deterministic: nothing is drawn.
    """
    state = _State(weight, start, replace(learning, codebook=0.0) if fixed else learning)
    for step in range(learning.steps):
        state.step(error, step / learning.steps)
    return state.quantized(fixed)


def choice_gradient(p: Tensor, entries: Tensor, learning: Learning) -> Tensor:
    """Return `dw^/dI_j` for probabilities and ascending entries, both `[3, ...]`."""
    distance = entries - (p * entries).sum(0)
    if learning.gradient == "ordinary":
        return p * distance
    eps = learning.eps * _local_step(entries)
    surrogate: Tensor = p * distance.sign() / (distance.abs() + eps)
    return surrogate


def _local_step(entries: Tensor) -> Tensor:
    """Return half the distance of the outer two of three entries; more than 0."""
    return ((entries[2] - entries[0]) / 2).abs().clamp(min=1e-6)


class _State:
    """Logits `[3, rows, columns]`, books `[books * levels]` over 127, logarithms of scales."""

    def __init__(self, weight: Tensor, start: QuantizedTensor, learning: Learning) -> None:
        assert start.codebook is not None
        self.start, self.learning = start, learning
        rows, columns = start.shape
        books = as_rows(start.codebook)
        self.levels, self.run = books.shape[1], rows // len(books)
        self.size = start.group_size or columns
        self.books = books.flatten() / LARGEST
        self.log_scales = (start.scales.reshape(rows, -1) * LARGEST).log()
        self.middle = start.codes.long().clamp(1, self.levels - 2)
        self.middle += (torch.arange(rows) // self.run * self.levels)[:, None]
        entries, spread = self.neighbours(), self.spread()
        distance = (entries - weight / spread) / _local_step(entries)
        self.logits = -learning.sharpness * distance.square()
        self.adam = [
            _Adam(parameter, size)
            for parameter, size in (
                (self.logits, learning.logits),
                (self.books, learning.codebook),
                (self.log_scales, learning.scales),
            )
        ]

    def neighbours(self) -> Tensor:
        """Return the three entries that each weight may take, `[3, rows, columns]`."""
        flat = self.middle.flatten()
        found = [self.books.index_select(0, flat + shift) for shift in (-1, 0, 1)]
        return torch.stack(found).view(3, *self.middle.shape)

    def spread(self) -> Tensor:
        """Return the scales as they multiply the entries."""
        scales = self.log_scales.exp()
        return scales if scales.shape[1] == 1 else scales.repeat_interleave(self.size, 1)

    def chosen(self) -> Tensor:
        """Return where in all books the entry of the greatest logit is, int64."""
        below, at, above = self.logits  # argmax along the first axis takes ten times as long
        up, down = above > torch.maximum(below, at), below > torch.maximum(at, above)
        index: Tensor = self.middle + up.long() - down.long()
        return index

    def step(self, error: OutputError, done: float) -> None:
        """Take one step of Adam; `done` is the share of the steps before it."""
        first, last = self.learning.temperature
        p = torch.softmax(self.logits / (first * (last / first) ** done), 0)
        index, spread = self.chosen(), self.spread()
        current = self.books[index] * spread
        gradient = error.gradient(current)
        of_entries = gradient * spread
        sums = torch.bincount(index.flatten(), of_entries.flatten().double(), len(self.books))
        of_scales = (gradient * current).reshape(*self.log_scales.shape, self.size).sum(-1)
        of_logits = choice_gradient(p, self.neighbours(), self.learning).mul_(of_entries)
        share = (1 + math.cos(math.pi * done)) / 2
        for adam, slope in zip(
            self.adam, (of_logits, sums.to(self.books.dtype), of_scales), strict=True
        ):
            adam.step(slope, share)

    def quantized(self, fixed: bool) -> QuantizedTensor:
        """Return what was learned, on the grids that are stored; `fixed` codebooks as they were."""
        assert self.start.codebook is not None
        books, codes = self.books.view(-1, self.levels), self.chosen()
        scales = self.log_scales.exp()
        if fixed:
            entries, scales, codes = self.start.codebook, scales / LARGEST, codes % self.levels
        else:
            books, order = books.sort(-1)
            codes = order.argsort(-1).flatten()[codes]  # entries may have passed each other
            entries, factors = snap(books, scales.reshape(len(books), -1))
            scales = scales * factors.repeat_interleave(self.run)[:, None]
        return replace(
            self.start,
            codes=codes.to(torch.uint8),
            scales=SCALES.round(scales.clamp(min=SMALLEST_SCALE)).reshape(self.start.scales.shape),
            codebook=entries.reshape(self.start.codebook.shape),
        )


class _Adam:
    """Adam (arXiv 1412.6980, algorithm 1) on one tensor, in place."""

    def __init__(self, parameter: Tensor, size: float) -> None:
        self.parameter, self.size, self.steps = parameter, size, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, gradient: Tensor, share: float) -> None:
        self.steps += 1
        first, second = _BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = math.sqrt(1 - second**self.steps)
        # The gradient's own size means nothing: what bounds the quotient is tiny.
        step = self.mean / (self.square.sqrt().div_(scale).add_(_TINY))
        self.parameter.sub_(step, alpha=self.size * share / (1 - first**self.steps))
