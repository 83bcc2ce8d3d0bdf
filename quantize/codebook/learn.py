"""Learning a codebook and which of its entries each weight takes, together, by gradient.

A reconstruction of JLCM (Yvinec, Dapogny, Bailly, arXiv 2309.17361), of which no hyper-parameters
are public. Each weight has three logits, for the entry that k-means gave it and its neighbours in
the ascending codebook; at either end for the three entries there. What is multiplied with is the
entry of the greatest logit; gradients pass straight through to the soft choice
`w^ = sum_j p_j C_j`, `p = softmax(logits / temperature)`:

    ordinary    dw^/dI_j = p_j (C_j - w^)
    proximal    dw^/dI_j = p_j sign(C_j - w^) / (|C_j - w^| + eps)

The ordinary gradient is the derivative of the softmax and grows with the distance of an entry; the
proximal one, the method's, decreases with it. Entries and scales have their true gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from edgekit.quantize.codebook.fit import nearest
from edgekit.quantize.codebook.snap import snap
from edgekit.quantize.scales import SCALES, SMALLEST_SCALE
from edgekit.quantize.tensor import QuantizedTensor, as_rows

Gradient = Literal["ordinary", "proximal"]


@dataclass(frozen=True)
class Learning:
    """How codebooks are learned; the defaults were found on lfm2-tiny (benchmarks/jlcm.py).

    steps        of Adam, whose step sizes fall to 0 along half a cosine
    logits       step size of the logits
    codebook     step size of entries, in units of the largest
    scales       step size of scales' logarithms
    temperature  of the softmax at the first step and the last, along a geometric series
    sharpness    how much likelier at first is the nearest entry than one a codebook's step further
    eps          of the proximal gradient, in units of the codebook's step
    """

    gradient: Gradient = "proximal"
    steps: int = 400
    logits: float = 0.05
    codebook: float = 1e-3
    scales: float = 1e-3
    temperature: tuple[float, float] = (1.0, 0.2)
    sharpness: float = 2.0
    eps: float = 0.1


class LearnedWeight:
    """One weight while it is learned: `weight()` is differentiable, `quantized()` is the result.

    Parameters: logits `[3, rows, columns]`, codebooks `[books, levels]` whose largest entry begins
    as 1, logarithms of the scales.
    """

    def __init__(self, weight: Tensor, start: QuantizedTensor, learning: Learning) -> None:
        """Begin with the codebooks, scales and indices of `start`, made of the float `weight`."""
        assert start.codebook is not None
        books, factors = snap(as_rows(start.codebook))
        run = start.shape[0] // len(books)
        self._start, self._learning = start, learning
        self._size = start.group_size or start.shape[1]
        self._top = books.abs().amax(-1, keepdim=True)
        self.books = (books / self._top).requires_grad_()
        scales = start.scales.reshape(start.shape[0], -1)
        spread = (factors * self._top[:, 0]).repeat_interleave(run)[:, None]
        self.log_scales = (scales * spread).log().requires_grad_()
        levels = books.shape[1]
        self._middle = start.codes.to(torch.int32).clamp(1, levels - 2)
        self._middle += (torch.arange(start.shape[0]) // run * levels).to(torch.int32)[:, None]
        self.logits = self._first_logits(weight).requires_grad_()

    def _first_logits(self, weight: Tensor) -> Tensor:
        """The nearer an entry, the likelier; distances are in units of the local step."""
        with torch.no_grad():
            below, at, above = self._neighbours()
            step = ((above - below) / 2).clamp(min=1e-6)
            exact = weight.float() / self._spread_scales()
            return torch.stack(
                [-self._learning.sharpness * ((c - exact) / step).square() for c in (below, at, above)]
            )

    def parameters(self) -> Iterator[dict[str, Any]]:
        """Yield the parameter groups for torch.optim.Adam."""
        yield {"params": [self.logits], "lr": self._learning.logits}
        yield {"params": [self.books], "lr": self._learning.codebook}
        yield {"params": [self.log_scales], "lr": self._learning.scales}

    def weight(self, temperature: float) -> Tensor:
        """Return the weight of the greatest logits, float32 `[rows, columns]`."""
        chosen: Tensor = _Choose.apply(
            self.logits, self.books, self._middle, temperature, self._learning
        )
        return chosen * self._spread_scales()

    def quantized(self) -> QuantizedTensor:
        """Return what was learned, on the grids that are stored."""
        with torch.no_grad():
            books, order = self.books.sort(-1)
            places = order.argsort(-1)  # entries that passed each other change their index
            index = (self._middle + self.logits.argmax(0).to(torch.int32) - 1).long()
            codes = places.flatten()[index]
            entries, factors = snap(books)
            run = len(codes) // len(books)
            scales = self.log_scales.exp() * factors.repeat_interleave(run)[:, None]
            scales = SCALES.round(scales.clamp(min=SMALLEST_SCALE)).reshape(self._start.scales.shape)
            assert self._start.codebook is not None
            return replace(
                self._start,
                codes=codes.to(torch.uint8),
                scales=scales,
                codebook=entries.reshape(self._start.codebook.shape),
            )

    def _neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        return _neighbours(self.books, self._middle)

    def _spread_scales(self) -> Tensor:
        scales = self.log_scales.exp()
        return scales if scales.shape[1] == 1 else scales.repeat_interleave(self._size, 1)


def _neighbours(books: Tensor, middle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = books.flatten()
    return flat[middle - 1], flat[middle], flat[middle + 1]


class _Choose(torch.autograd.Function):
    """The entry of the greatest logit, with the gradients that the module describes."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        books: Tensor,
        middle: Tensor,
        temperature: float,
        learning: Learning,
    ) -> Tensor:
        index = middle + logits.argmax(0).to(torch.int32) - 1
        ctx.save_for_backward(logits, books, middle, index)
        ctx.temperature, ctx.learning = temperature, learning  # type: ignore[attr-defined]
        return books.flatten()[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        logits, books, middle, index = ctx.saved_tensors
        total = torch.bincount(
            index.flatten().long(), gradient.flatten().double(), books.numel()
        )
        p = torch.softmax(logits / ctx.temperature, 0)
        surrogate = choice_gradient(p, torch.stack(_neighbours(books, middle)), ctx.learning)
        return surrogate * gradient, total.view_as(books).to(books.dtype), None, None, None


def choice_gradient(p: Tensor, entries: Tensor, learning: Learning) -> Tensor:
    """Return `dw^/dI_j` for probabilities and entries `[3, ...]`."""
    distance = entries - (p * entries).sum(0)
    if learning.gradient == "ordinary":
        return p * distance
    step = (entries[2] - entries[0]).abs() / 2
    eps = learning.eps * step.clamp(min=1e-6)
    return p * distance.sign() / (distance.abs() + eps)
