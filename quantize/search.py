"""The scale of least squared error, searched for among the storable ones."""

import torch
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.grid import Grid
from edgekit.quantize.ranges import Parameters, from_range, slab_width, slabs

# How far the range of minimum and maximum is shrunk, chosen against an exhaustive search over all
# storable scales: 4 bits come within 0.1 dB of it on Gaussian and heavy-tailed weights. A group
# has no tail to clip, thousands of elements have; at 8 bits it matters most which of the nearest
# storable scales is taken.
_GROUP = 256
_GROUP_FACTORS = tuple(0.92**step for step in range(1, 6))
_LONG_FACTORS = tuple(0.9**step for step in range(1, 13))
_FINE_FACTORS = tuple(1 - 0.008 * step for step in range(1, 10))
_REFITS = 2


def least_error(values: Tensor, least: Tensor, most: Tensor, grid: Grid) -> Parameters:
    """Return scales and zero points of float ranges [ranges, elements] that span [least, most].

    Candidates are shrunk ranges, then least-squares refits of the best one's codes; each is
    rounded to the storable grid before its error is measured, so the result is never worse than
    minimum and maximum.
    """
    return _Search(values, grid).run(least, most)


class _Search:
    """Measures candidates in buffers that are allocated once: fresh pages cost more than sums."""

    def __init__(self, values: Tensor, grid: Grid) -> None:
        self.values = values
        self.grid = grid
        size = (len(values), min(values.shape[1], slab_width(values)))
        self.exact, self.codes, self.product = torch.empty(3, *size, device=values.device)

    def run(self, least: Tensor, most: Tensor) -> Parameters:
        best = from_range(least, most, self.grid)
        error = self.error(best)
        for factor in _factors(self.values.shape[1], self.grid.bits):
            candidate = from_range(least * factor, most * factor, self.grid)
            best, error = self.better(best, error, candidate)
        for _ in range(_REFITS):
            best, error = self.better(best, error, (self.refit(best), best[1]))
        if self.grid.two_levels:
            return super_blocks.nearest(best[0], lambda scales: self.error((scales, None))), None
        return best

    def better(
        self, best: Parameters, error: Tensor, candidate: Parameters
    ) -> tuple[Parameters, Tensor]:
        """Take the candidate for the ranges where its error is smaller."""
        challenger = self.error(candidate)
        take = challenger < error
        zeros = None
        if best[1] is not None and candidate[1] is not None:
            zeros = torch.where(take, candidate[1], best[1])
        scales = torch.where(take, candidate[0], best[0])
        return (scales, zeros), torch.where(take, challenger, error)

    def error(self, parameters: Parameters) -> Tensor:
        """Return each range's squared error, float32 [ranges]."""
        total = torch.zeros(len(self.values), device=self.values.device)
        for part in slabs(self.values):
            exact, codes, product = self.steps(part, parameters)
            torch.sub(codes, exact, out=product)
            total += product.square_().sum(dim=1)
        return total * parameters[0].square()

    def refit(self, parameters: Parameters) -> Tensor:
        """Return the storable scales that fit the codes q best: `sum x q / sum q^2`."""
        products, squares = torch.zeros(2, len(self.values), device=self.values.device)
        for part in slabs(self.values):
            exact, codes, product = self.steps(part, parameters)
            products += torch.mul(exact, codes, out=product).sum(dim=1)
            squares += codes.square_().sum(dim=1)
        # Where every code is 0 there is nothing to fit.
        ratio = torch.where(squares > 0, products / squares.clamp(min=1), 1.0)
        scales = self.grid.scales
        return scales.round((ratio * parameters[0]).clamp(max=scales.largest))

    def steps(self, part: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
        """Return part / D, the nearest allowed x_Q - z, and a buffer of the same shape."""
        scales, zeros = parameters
        width = part.shape[1]
        exact, codes, product = (
            buffer[:, :width] for buffer in (self.exact, self.codes, self.product)
        )
        # A part as stored (bfloat16) is promoted to float32 by the scales.
        torch.div(part, scales[:, None], out=exact)
        torch.round(exact, out=codes)
        if zeros is None:
            codes.clamp_(self.grid.low, self.grid.high)
        else:
            codes.clamp_((self.grid.low - zeros)[:, None], (self.grid.high - zeros)[:, None])
        return exact, codes, product


def _factors(elements: int, bits: int) -> tuple[float, ...]:
    if elements <= _GROUP and bits in (5, 6):
        return _FINE_FACTORS
    if bits == 8:
        return _FINE_FACTORS + _LONG_FACTORS
    return _GROUP_FACTORS if elements <= _GROUP and bits == 4 else _LONG_FACTORS
