"""What `torch.compile` calls without looking into it.

Ranges are checked as they are found, and searched for: both ask for numbers, which no graph of
operators has before it runs. As operators of their own they need not break it. None of them has a
gradient.
"""

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.affine import choose
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.ranges import Parameters
from edgekit.quantize.scales import ScaleGrid
from edgekit.quantize.schemes.sizes import scales_shape


def choose_ranges(
    name: str,
    weight: Tensor,
    grid: Grid,
    axis: int | None,
    group_size: int | None,
    method: RangeMethod,
) -> Parameters:
    """Return what `choose` does; EdgekitError where it raises ValueError."""
    kind = (grid.bits, grid.symmetric, grid.restricted)
    scales, zeros = _choose(weight.detach(), name, *kind, axis, group_size, method)
    return scales, None if grid.symmetric else zeros


def storable(scales: Tensor, grid: ScaleGrid) -> Tensor:
    """Return what `ScaleGrid.round` does."""
    rounded: Tensor = _round(scales, grid.significant_bits, grid.largest, grid.smallest)
    return rounded


@torch.library.custom_op("edgekit::choose_ranges", mutates_args=())
def _choose(
    weight: Tensor,
    name: str,
    bits: int,
    symmetric: bool,
    restricted: bool,
    axis: int | None,
    group_size: int | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    try:
        grid = Grid(bits, symmetric, restricted)
        scales, zeros = choose(weight, grid, axis, group_size, method)  # type: ignore[arg-type]
    except ValueError as error:
        raise EdgekitError(f"{name}: cannot be quantized: {error}") from error
    return scales, weight.new_empty(0, dtype=torch.int32) if zeros is None else zeros


@_choose.register_fake
def _(
    weight: Tensor,
    name: str,
    bits: int,
    symmetric: bool,
    restricted: bool,
    axis: int | None,
    group_size: int | None,
    method: str,
) -> tuple[Tensor, Tensor]:
    count = torch.Size(scales_shape(tuple(weight.shape), axis, group_size)).numel()
    zeros = weight.new_empty(0 if symmetric else count, dtype=torch.int32)
    return weight.new_empty(count, dtype=torch.float32), zeros


@torch.library.custom_op("edgekit::storable_scales", mutates_args=())
def _round(scales: Tensor, significant_bits: int, largest: float, smallest: float) -> Tensor:
    return ScaleGrid(significant_bits, largest, smallest).round(scales)


@_round.register_fake
def _(scales: Tensor, significant_bits: int, largest: float, smallest: float) -> Tensor:
    return torch.empty_like(scales)
