"""One-dimensional k-means, plain and weighted: the codebook of least squared error.

`sum_i h_i (x_i - c_a(i))^2` over k centres c. With `h` the diagonal of the Hessian of a layer's
output error, the mean square of each weight's input, this is the sensitivity-weighted k-means of
SqueezeLLM (arXiv 2306.07629, equation 3; there from squared gradients).

On a line the clusters of the optimum are runs of the sorted values, so dynamic programming finds
it. It is run over at most some hundred bins, each a run of sorted values, and gives the optimum
where each bin holds one value; Lloyd's iterations over all values follow.
"""

import torch
from torch import Tensor

_BINS = 256
"""Bins of equal count, and as many of equal width: tails keep their resolution."""
_ITERATIONS = 100
_LEAST_WEIGHT = 1e-9
"""Share of the mean weight that every value has at least: an input that is always 0 may come."""


def kmeans(values: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """Return `levels` centres, float32 in ascending order, of finite values of any shape.

    `weights`, not negative and of the values' shape, count each squared error; None: all alike.
    Deterministic. With fewer distinct values than levels the last centre is repeated.
    """
    points, order = values.detach().reshape(-1).to(torch.float64).sort()
    if weights is None:
        mass = torch.ones_like(points)
    else:
        mass = weights.detach().reshape(-1).to(torch.float64)[order]
        mass = mass + _LEAST_WEIGHT * mass.mean().clamp(min=torch.finfo(torch.float32).tiny)
    sums = _Sums(points, mass)
    edges = _bin_edges(points)
    starts = edges[_best_runs(sums, edges, levels)]
    centres = _lloyd(points, sums, sums.means(starts, sums.ends(starts)))
    missing = levels - len(centres)
    return torch.cat([centres, centres[-1:].expand(missing)]).to(torch.float32)


class _Sums:
    """Prefix sums of weights, first and second moments, so that any run costs nothing."""

    def __init__(self, points: Tensor, mass: Tensor) -> None:
        # About a middle: the cost is a difference of squares, which cancels far from 0.
        self.middle = (points * mass).sum() / mass.sum()
        centred = points - self.middle
        self.count = len(points)
        self.zeroth, self.first, self.second = (
            torch.nn.functional.pad(part.cumsum(0), (1, 0))
            for part in (mass, mass * centred, mass * centred.square())
        )

    def ends(self, starts: Tensor) -> Tensor:
        """Return where each run ends that begins at `starts` and is followed by the next."""
        return torch.cat([starts[1:], starts.new_tensor([self.count])])

    def means(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Return the weighted means of runs that are not empty."""
        mass = self.zeroth[ends] - self.zeroth[starts]
        return (self.first[ends] - self.first[starts]) / mass + self.middle

    def costs(self, edges: Tensor) -> Tensor:
        """Return the squared error `[i, j]` of one centre from edge i to edge j; inf for j <= i."""
        mass, first, second = (
            part[edges][None] - part[edges][:, None]
            for part in (self.zeroth, self.first, self.second)
        )
        costs = second - first.square() / mass.clamp(min=torch.finfo(torch.float64).tiny)
        runs = torch.ones_like(costs, dtype=torch.bool).triu(1)
        return torch.where(runs, costs.clamp(min=0), torch.inf)


def _bin_edges(points: Tensor) -> Tensor:
    """Return the first place of each bin of sorted values and, last, their number."""
    count = len(points)
    distinct = torch.cat([points.new_ones(1, dtype=torch.bool), points[1:] != points[:-1]])
    firsts = distinct.nonzero()[:, 0]
    if len(firsts) > 2 * _BINS:
        steps = torch.arange(_BINS, dtype=torch.float64) / _BINS
        even = (steps * count).long()
        wide = torch.searchsorted(points, points[0] + steps * (points[-1] - points[0]))
        firsts = torch.cat([even, wide]).unique()
    return torch.cat([firsts, firsts.new_tensor([count])])


def _best_runs(sums: _Sums, edges: Tensor, levels: int) -> Tensor:
    """Return which edges begin the runs of least cost, at most `levels` of them."""
    costs = sums.costs(edges)
    levels = min(levels, len(edges) - 1)
    best, cuts = costs[0], []
    for _ in range(levels - 1):
        total = best[:, None] + costs
        best, cut = total.min(0)
        cuts.append(cut)
    place, starts = len(edges) - 1, []
    for cut in reversed(cuts):
        place = int(cut[place])
        starts.append(place)
    return torch.tensor([0, *reversed(starts)])


def _lloyd(points: Tensor, sums: _Sums, centres: Tensor) -> Tensor:
    """Move centres to the mean of what is nearest to them until nothing changes."""
    starts = torch.empty(0, dtype=torch.long)
    for _ in range(_ITERATIONS):
        middles = (centres[1:] + centres[:-1]) / 2
        found = torch.nn.functional.pad(torch.searchsorted(points, middles), (1, 0))
        if torch.equal(found, starts):
            break
        starts, ends = found, sums.ends(found)
        means = sums.means(starts, ends)
        centres = torch.where(ends > starts, means, centres)
    return centres
