"""The whitepaper's quantizers: properties over random and odd weights, and independent peers."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekit.quantize.affine import quantize, quantize_with
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.scales import LARGEST_SCALE, SCALES, SCALES_OF_Q4_1, SMALLEST_SCALE, ScaleGrid
from edgekit.quantize.tensor import CHUNK_ELEMENTS, QuantizedTensor

GRIDS = [
    Grid(bits, symmetric, restricted)
    for bits in (4, 8)
    for symmetric, restricted in ((True, False), (True, True), (False, False))
]
LAYOUTS: list[tuple[int | None, int | None]] = [(None, None), (0, None), (1, None), (None, 4)]
METHODS: list[RangeMethod] = ["minmax", "mse"]

grids = st.sampled_from(GRIDS)
layouts = st.sampled_from(LAYOUTS)
methods = st.sampled_from(METHODS)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of 8 columns whose rows differ in size, sign, zeros and offset."""
    rows = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 8, generator=generator)
    exponents = [draw(st.sampled_from([-40, -20, -14, -3, 0, 5])) for _ in range(rows)]
    offsets = [draw(st.sampled_from([0.0, 3.0, -3.0])) for _ in range(rows)]
    values = (values + torch.tensor(offsets)[:, None]) * torch.tensor(exponents).exp2()[:, None]
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = draw(st.sampled_from([0.0, 0.37, -1e-42, -5.0]))
    return values.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def spread(values: Tensor, like: QuantizedTensor) -> Tensor:
    """Repeat scales or zero points to the weight's shape."""
    if like.group_size is not None:
        return values.repeat_interleave(like.group_size, dim=-1)
    if like.axis == 0:
        return values[:, None].expand(like.shape)
    return values.expand(like.shape)


def limits(grid: Grid, result: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest number that the codes can stand for, per element."""
    zeros = torch.zeros(()) if result.zero_points is None else spread(result.zero_points, result)
    scales = spread(result.scales, result)
    return (grid.low - zeros) * scales, (grid.high - zeros) * scales


def storable(scales: Tensor) -> bool:
    """Bfloat16 valued, and unchanged and normal in float16."""
    exact = torch.equal(scales.bfloat16().float(), scales)
    half = torch.equal(scales.half().float(), scales)
    return exact and half and bool((scales >= SMALLEST_SCALE).all())


@settings(deadline=None, max_examples=150)
@given(weight=weights(), grid=grids, layout=layouts, method=methods)
def test_codes_scales_and_errors_are_in_bounds(
    weight: Tensor, grid: Grid, layout: tuple[int | None, int | None], method: RangeMethod
) -> None:
    result = quantize(weight, grid, axis=layout[0], group_size=layout[1], method=method)
    assert result.codes.dtype == grid.dtype
    assert int(result.codes.min()) >= grid.low
    assert int(result.codes.max()) <= grid.high
    assert storable(result.scales)
    values, restored = weight.float(), result.dequantize()
    # What lies inside the grid moves by half a step, what lies outside goes to its end.
    low, high = limits(grid, result)
    nearest = torch.minimum(torch.maximum(values, low), high)
    tolerance = spread(result.scales, result) * 0.5 * (1 + 1e-5)
    assert bool(((restored - nearest).abs() <= tolerance).all())
    if method == "minmax":
        assert bool(((restored - values).abs() <= tolerance).all())


@settings(deadline=None, max_examples=100)
@given(weight=weights(), grid=grids, layout=layouts, method=methods)
def test_quantizing_again_changes_nothing(
    weight: Tensor, grid: Grid, layout: tuple[int | None, int | None], method: RangeMethod
) -> None:
    axis, group = layout
    first = quantize(weight, grid, axis=axis, group_size=group, method=method)
    again = quantize_with(
        first.dequantize(), grid, first.scales, first.zero_points, axis=axis, group_size=group
    )
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.dequantize(), first.dequantize())


@settings(deadline=None, max_examples=60)
@given(weight=weights(), grid=grids, method=methods, seed=st.integers(0, 2**31))
def test_rows_are_independent(weight: Tensor, grid: Grid, method: RangeMethod, seed: int) -> None:
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    whole = quantize(weight, grid, axis=0, method=method)
    moved = quantize(weight[order], grid, axis=0, method=method)
    assert torch.equal(moved.codes, whole.codes[order])
    assert torch.equal(moved.scales, whole.scales[order])
    alone = quantize(weight[:1], grid, axis=0, method=method)
    assert torch.equal(alone.codes, whole.codes[:1])


@settings(deadline=None, max_examples=60)
@given(weight=weights(), grid=grids, layout=layouts)
def test_zero_stays_zero(weight: Tensor, grid: Grid, layout: tuple[int | None, int | None]) -> None:
    weight[0, 0] = 0
    result = quantize(weight, grid, axis=layout[0], group_size=layout[1])
    assert float(result.dequantize()[0, 0]) == 0


@settings(deadline=None, max_examples=60)
@given(weight=weights(), grid=grids, layout=layouts)
def test_least_squares_is_no_worse_than_minmax(
    weight: Tensor, grid: Grid, layout: tuple[int | None, int | None]
) -> None:
    errors = [
        float((result.dequantize().double() - weight.double()).square().sum())
        for result in (
            quantize(weight, grid, axis=layout[0], group_size=layout[1], method=method)
            for method in METHODS
        )
    ]
    assert errors[1] <= errors[0] * (1 + 1e-4)


@pytest.mark.parametrize(
    ("grid", "elements", "least_gain_db"),
    [(Grid(4), 32, 0.4), (Grid(4), 2048, 2.0), (Grid(4, symmetric=False), 32, 0.3)],
)
def test_the_search_comes_close_to_an_exhaustive_one(
    grid: Grid, elements: int, least_gain_db: float
) -> None:
    weight = torch.randn(64, elements, generator=torch.Generator().manual_seed(5))
    minmax = quantize(weight, grid, axis=0)

    def error(result: QuantizedTensor) -> Tensor:
        return (result.dequantize() - weight).square().sum(dim=1)

    best = error(minmax)
    for candidate in _storable_between(grid, 0.3, 1.05, minmax.scales):
        zeros = None
        if minmax.zero_points is not None:
            low = weight.amin(dim=1) * (candidate / minmax.scales)
            zeros = (-low / candidate).round().clamp(0, grid.high).to(torch.int32)
        best = torch.minimum(best, error(quantize_with(weight, grid, candidate, zeros, axis=0)))
    searched = error(quantize(weight, grid, axis=0, method="mse"))
    assert 10 * math.log10(float(searched.sum() / best.sum())) < 0.2
    assert 10 * math.log10(float(error(minmax).sum() / searched.sum())) > least_gain_db


def _storable_between(grid: Grid, low: float, high: float, scales: Tensor) -> Iterator[Tensor]:
    """Yield every storable scale (and some twice) between two multiples of `scales`."""
    for step in range(300):
        yield grid.scales.round(scales * (low + (high - low) * step / 299))


def test_the_full_four_bit_range_beats_the_restricted_one() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((quantize(weight, grid, group_size=32, method="mse").dequantize() - weight).norm())
        for grid in (Grid(4), Grid(4, restricted=True))
    ]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-40, 2.0**-16, -(2.0**-20)])
def test_tiny_constant_rows_are_zero_rows(grid: Grid, method: RangeMethod, value: float) -> None:
    result = quantize(torch.full((2, 8), value), grid, axis=0, method=method)
    assert float(result.dequantize().abs().max()) == 0
    assert result.scales.tolist() == [SMALLEST_SCALE] * 2


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [1.0, -0.3, 7e-3, 1000.0])
def test_constant_rows_keep_their_value(grid: Grid, value: float) -> None:
    result = quantize(torch.full((2, 8), value), grid, axis=0)
    assert float(result.dequantize()[0, 0]) == pytest.approx(value, rel=1 / 64)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_that_are_not_finite_are_refused(
    bad: float, layout: tuple[int | None, int | None]
) -> None:
    weight = torch.ones(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize(weight, Grid(8), axis=layout[0], group_size=layout[1])
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_with(weight, Grid(8), torch.ones(()))


def test_values_too_large_for_any_scale_are_refused() -> None:
    limit = LARGEST_SCALE * 127
    assert quantize(torch.tensor([limit, 0.0]), Grid(8)).codes.tolist() == [127, 0]
    with pytest.raises(ValueError, match="largest"):
        quantize(torch.tensor([limit * 1.1]), Grid(8))
    with pytest.raises(ValueError, match="largest"):
        quantize(torch.tensor([-3e38, 3e38]), Grid(8, symmetric=False))


@pytest.mark.parametrize(
    ("weight", "axis", "group", "message"),
    [
        (torch.ones(4, 8), None, 3, "group size 3 does not divide"),
        (torch.ones(4, 8), None, 16, "group size 16 does not divide"),
        (torch.ones(4, 8), 2, None, "axis must be"),
        (torch.ones(4, 8), 0, 4, "exclude each other"),
        (torch.ones(4, 0), 0, None, "must not be empty"),
        (torch.ones(4, 8, dtype=torch.int32), 0, None, "must be float32"),
        (torch.ones(4, 8, dtype=torch.float64), 0, None, "must be float32"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    weight: Tensor, axis: int | None, group: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, Grid(8), axis=axis, group_size=group)


def test_grids_are_those_of_the_whitepaper() -> None:
    assert [(grid.low, grid.high) for grid in GRIDS] == [
        (-8, 7),
        (-7, 7),
        (0, 15),
        (-128, 127),
        (-127, 127),
        (0, 255),
    ]
    with pytest.raises(ValueError, match="bits must be"):
        Grid(7)
    with pytest.raises(ValueError, match="restricted"):
        Grid(4, symmetric=False, restricted=True)


@settings(deadline=None, max_examples=200)
@given(
    value=st.floats(2.0**-14, 4352.0, width=32), scales=st.sampled_from([SCALES, SCALES_OF_Q4_1])
)
def test_scales_are_rounded_to_the_nearest_or_the_next_storable(
    value: float, scales: ScaleGrid
) -> None:
    exact = torch.tensor([value])
    nearest, up = scales.round(exact), scales.round(exact, up=True)
    if scales is SCALES:
        assert torch.equal(nearest, exact.bfloat16().float())
    assert storable(nearest)
    assert storable(up)
    assert float(up) >= value
    # Neighbours of 8 significant bits are at most 1 part in 128 apart.
    apart = 2.0 ** (1 - scales.significant_bits)
    assert abs(float(nearest) - value) <= value * apart / 2
    assert float(up) - value < value * apart
    assert torch.equal(scales.round(nearest, up=True), nearest)


def test_the_products_of_an_affine_scale_of_4_bits_are_exact_in_float16() -> None:
    steps = torch.arange(-14, 13, dtype=torch.float32).exp2()[:, None]
    scales = (steps * (torch.arange(64, 128) / 64)).flatten()
    scales = scales[scales <= SCALES_OF_Q4_1.largest]
    assert torch.equal(SCALES_OF_Q4_1.round(scales), scales)
    products = scales[:, None] * torch.arange(16)
    assert torch.equal(products.half().float(), products)


def test_rounding_beyond_the_ends() -> None:
    for scales in (SCALES, SCALES_OF_Q4_1):
        assert float(scales.round(torch.zeros(1))) == SMALLEST_SCALE
        for value in (65504.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"end at {scales.largest:.0f}"):
                scales.round(torch.tensor([value]))


@pytest.mark.parametrize("grid", [Grid(8, restricted=True), Grid(4)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [None, 0])
def test_large_tensors_are_quantized_in_pieces_alike(
    grid: Grid, method: RangeMethod, axis: int | None
) -> None:
    rows, columns = 5, CHUNK_ELEMENTS // 2 + 77
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    result = quantize(weight, grid, axis=axis, method=method)
    steps = weight.float() / (result.scales if axis is None else result.scales[:, None])
    assert torch.equal(result.codes, steps.round().clamp(grid.low, grid.high).to(torch.int8))
    if axis == 0:
        alone = quantize(weight[3].float(), grid, method=method)
        assert float(alone.scales) == pytest.approx(float(result.scales[3]), rel=1 / 64)
