"""The uniform quantizers of Krishnamoorthi's whitepaper (arXiv 1806.08342, section 2).

Affine (equations 1 to 3): `x_Q = clamp(0, N - 1, round(x / D) + z)` and `x = (x_Q - z) D`; the
range always contains 0, so 0 is exact. Symmetric (section 2.2): z = 0 and the clamp is to
[-N/2, N/2 - 1] (full range) or [-(N/2 - 1), N/2 - 1] (restricted).
Rounding is to nearest, ties to even. Scales D lie on the grid of `edgekit.quantize.scales`, and
codes are computed with the rounded scale, so that what is stored is what was measured.

What the odd inputs give: ranges of zeros have scale 2**-14 and codes that stand for 0, and so
have values below half of 2**-14 (denormals among them); constant rows are ranges like any other,
each value within half a scale; infinities and NaN raise ValueError.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RANGE_METHODS, RangeMethod
from edgekit.quantize.ranges import Parameters, finite_range, from_range, slabs
from edgekit.quantize.schemes.sizes import scales_shape
from edgekit.quantize.search import least_error
from edgekit.quantize.tensor import CHUNK_ELEMENTS, QuantizedTensor


def quantize(
    weight: Tensor,
    grid: Grid,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    method: RangeMethod = "minmax",
) -> QuantizedTensor:
    """Choose ranges for a float weight and return its codes.

    `axis` gives one scale per channel, `group_size` one per run of the last axis, neither one
    scale for the tensor. `method` minmax covers every value, mse minimises the squared error. Works
    in cache-sized pieces: beside the codes, no copy of a contiguous weight is made unless `axis` is
    above 0. Raises ValueError for types other than float32, float16 and bfloat16, for shapes that
    cannot be grouped, and for values that are infinite, NaN or too large to store.
    """
    if method not in RANGE_METHODS:
        raise ValueError(f"range must be one of {', '.join(RANGE_METHODS)}, got {method!r}")
    shape = scales_shape(tuple(weight.shape), axis, group_size)
    rows = as_ranges(_checked(weight).detach(), axis, group_size)
    scales = torch.empty(len(rows))
    zeros = None if grid.symmetric else torch.empty(len(rows), dtype=torch.int32)
    codes = torch.empty(rows.shape, dtype=grid.dtype)
    for part, values in _pieces(rows):
        scale, zero = _choose(values, grid, method)
        scales[part] = scale
        if zeros is not None and zero is not None:
            zeros[part] = zero
        _encode(codes[part], values, (scale, zero), grid)
    return QuantizedTensor(
        codes=from_ranges(codes, weight, axis),
        scales=scales.reshape(shape),
        zero_points=None if zeros is None else zeros.reshape(shape),
        bits=grid.bits,
        group_size=group_size,
        axis=axis,
    )


def choose(
    weight: Tensor, grid: Grid, axis: int | None, group_size: int | None, method: RangeMethod
) -> Parameters:
    """Return the scales and zero points, flat [ranges], that `quantize` would choose.

    Takes its arguments and raises what it does.
    """
    rows = as_ranges(_checked(weight).detach(), axis, group_size)
    found = [_choose(values, grid, method) for _, values in _pieces(rows)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def quantize_with(
    weight: Tensor,
    grid: Grid,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> QuantizedTensor:
    """Return the codes of a float weight for scales and zero points that are already chosen.

    Shapes as in `QuantizedTensor`. Values out of range are clamped. Quantizing what the result
    dequantizes to, with the same scales, gives the same codes. Raises ValueError as `quantize`
    does and for scales or zero points of another shape.
    """
    shape = scales_shape(tuple(weight.shape), axis, group_size)
    if tuple(scales.shape) != shape or (zero_points is None) != grid.symmetric:
        raise ValueError(
            f"expected scales of shape {shape} and {'no ' if grid.symmetric else ''}zero_points, "
            f"got shape {tuple(scales.shape)} and {'no ' if zero_points is None else ''}zero_points"
        )
    rows = as_ranges(_checked(weight).detach(), axis, group_size)
    codes = torch.empty(rows.shape, dtype=grid.dtype)
    flat = scales.reshape(-1)
    zeros = None if zero_points is None else zero_points.reshape(-1)
    for part, values in _pieces(rows):
        finite_range(values)
        _encode(codes[part], values, (flat[part], None if zeros is None else zeros[part]), grid)
    return QuantizedTensor(
        codes=from_ranges(codes, weight, axis),
        scales=scales,
        zero_points=zero_points,
        bits=grid.bits,
        group_size=group_size,
        axis=axis,
    )


def _choose(values: Tensor, grid: Grid, method: RangeMethod) -> Parameters:
    """Return the parameters of float ranges [ranges, elements]."""
    least, most = finite_range(values)
    if method == "mse":
        return least_error(values, least, most, grid)
    scales, zeros = from_range(least, most, grid)
    return (super_blocks.covering(scales) if grid.two_levels else scales), zeros


def _encode(codes: Tensor, values: Tensor, parameters: Parameters, grid: Grid) -> None:
    """Write the codes of float ranges [ranges, elements] into `codes` of the same shape."""
    scales, zeros = parameters
    for target, part in zip(slabs(codes), slabs(values), strict=True):
        # A part as stored (bfloat16) is promoted to float32 by the scales.
        steps = (part / scales[:, None]).round_()
        if zeros is not None:
            steps += zeros[:, None]
        target.copy_(steps.clamp_(grid.low, grid.high))


def as_ranges(weight: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Return a weight as [ranges, elements]: one row for each scale.

    ValueError for a shape that cannot be grouped.
    """
    count = torch.Size(scales_shape(tuple(weight.shape), axis, group_size)).numel()
    return (weight.movedim(axis, 0) if axis else weight).reshape(count, -1)


def from_ranges(rows: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """Turn [ranges, elements] back into the weight's shape."""
    if not axis:
        return rows.reshape(weight.shape)
    return rows.reshape(weight.movedim(axis, 0).shape).movedim(0, axis).contiguous()


def _checked(weight: Tensor) -> Tensor:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"weights must be float32, float16 or bfloat16, got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"weights must not be empty, got shape {tuple(weight.shape)}")
    return weight


def _pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the ranges with their values, as float32 where they fit in the cache."""
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = rows[part]
        # One long range stays as stored and is converted slab by slab.
        yield part, values.to(torch.float32) if values.numel() <= CHUNK_ELEMENTS else values
