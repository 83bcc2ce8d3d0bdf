"""Scales and zero points that cover a range, and how values are taken apart for it.

Values come as [ranges, elements], one row for each scale; no row's result depends on another's.
"""

import torch
from torch import Tensor

from edgekit.quantize.grid import Grid
from edgekit.quantize.tensor import CHUNK_ELEMENTS

Parameters = tuple[Tensor, Tensor | None]
"""Scales (float32, storable) and zero points (int32; None for a symmetric grid), one per range."""


def finite_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float32 minimum and maximum of each range; ValueError where not finite."""
    # Two passes: torch.aminmax is not vectorised along an axis and takes ten times as long.
    least, most = values.amin(dim=1), values.amax(dim=1)
    if not bool((least.isfinite() & most.isfinite()).all()):  # NaN propagates through both
        raise ValueError("the weight holds infinities or NaN")
    return least.to(torch.float32), most.to(torch.float32)


def from_range(least: Tensor, most: Tensor, grid: Grid) -> Parameters:
    """Return the scales, and zero points, that cover [least, most] and 0.

    Symmetric: `D = max(most / high, least / low)`, the smallest scale that clips nothing.
    Affine: `D = (most - least) / (N - 1)` and `z = round(-least / D)`, so that 0 is a code.
    Raises ValueError where the values are too large for a storable scale.
    """
    # Widened to contain 0: padding and pruned weights must stay exactly 0.
    least, most = least.clamp(max=0), most.clamp(min=0)
    if grid.symmetric:
        return grid.scales.round(torch.maximum(most / grid.high, least / grid.low)), None
    # Divided before the subtraction, which could overflow.
    scales = grid.scales.round(most / grid.high - least / grid.high, up=True)
    return scales, (-least / scales).round().clamp(grid.low, grid.high).to(torch.int32)


def slab_width(values: Tensor) -> int:
    """Return how many elements of each range [ranges, elements] fit in the cache together."""
    return max(1, CHUNK_ELEMENTS // len(values))


def slabs(values: Tensor) -> tuple[Tensor, ...]:
    """Split ranges [ranges, elements] along the elements into cache-sized views."""
    return torch.split(values, slab_width(values), dim=1)
