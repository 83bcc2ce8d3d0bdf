"""GPTQ: rounding that makes up, in the columns still to come, for the error of those before.

Frantar et al., arXiv 2210.17323: a linear layer's output error on calibration inputs X is
`|| (W - W^) X ||^2`, a quadratic form in each row of W with the Hessian `H = X X^T`. Columns are
rounded in turn; each one's error is spread over the columns that are not rounded yet by the rows
of the Cholesky factor of `H^-1` (algorithm 1 there), here from the column of the largest diagonal
to that of the smallest, with scales that are chosen before (their `act-order`, `static groups`).
"""

import torch
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.affine import quantize_with
from edgekit.quantize.grid import Grid
from edgekit.quantize.ranges import Parameters, from_range
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.tensor import QuantizedTensor

_DAMPINGS = (0.01, 0.1, 1.0)
"""Shares of the mean diagonal that are added to the diagonal: the paper's (section 4.1), and more
where float32 cannot factorise the sum."""
_BLOCK = 128
"""Columns whose updates reach the rest of the matrix in one product (section 3.3, step 2)."""
# How far the range of the largest value is shrunk in the search for a scale.
_FACTORS = tuple(1 - 0.025 * step for step in range(17))


class Inputs:
    """What a linear layer sees in calibration, as matrices of sums over the samples.

    With X the inputs that the quantized part of the model gives it, Y those that the float model
    gives it, and Z what the layer's output should hold in addition: the Hessian `X X^T / n`
    `[columns, columns]`, `Y X^T / n` and `Z X^T / n` `[rows, columns]`, summed in float32.
    """

    def __init__(self, columns: int) -> None:
        """Start without samples."""
        self._samples = 0
        self._hessian = torch.zeros(columns, columns)
        self._cross = torch.zeros(columns, columns)
        self._owed: Tensor | None = None

    def add(self, quantized: Tensor, exact: Tensor, owed: Tensor | None = None) -> None:
        """Add inputs `[n, columns]` of the same tokens in both models.

        `owed` `[n, rows]` is what the output, to which a layer adds its residual, should make up
        for: the float model's residual less the quantized one's.
        """
        self._hessian.addmm_(quantized.t(), quantized)
        self._cross.addmm_(exact.t(), quantized)
        if owed is not None:
            if self._owed is None:
                self._owed = torch.zeros(owed.shape[1], quantized.shape[1])
            self._owed.addmm_(owed.t(), quantized)
        self._samples += len(quantized)

    @property
    def hessian(self) -> Tensor:
        """`X X^T / n`; ValueError without samples or with ones that are not finite."""
        return self._mean(self._hessian)

    @property
    def cross(self) -> Tensor:
        """`Y X^T / n`; ValueError as `hessian`."""
        return self._mean(self._cross)

    @property
    def owed(self) -> Tensor | None:
        """`Z X^T / n`, None where nothing is owed; ValueError as `hessian`."""
        return None if self._owed is None else self._mean(self._owed)

    def _mean(self, total: Tensor) -> Tensor:
        if not self._samples:
            raise ValueError("calibration saw no inputs of this layer")
        if not bool(total.sum().isfinite()):
            raise ValueError("calibration saw inputs that are not finite")
        return total / self._samples


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
    """Return the codes of a float weight `[rows, columns]` that GPTQ chooses for a scheme.

    What is approximated is the float layer's output on the float model's inputs, and what is owed
    to it, so a layer makes up for what the layers before it lost. Ranges minimise the error
    weighted by the Hessian's diagonal. Raises ValueError for the float scheme, for shapes that do
    not fit and for values that are not finite.
    """
    columns = weight.shape[1]
    hessian = inputs.hessian
    if hessian.shape != (columns, columns):
        raise ValueError(f"expected inputs of {columns} columns, got {len(hessian)}")
    exact = weight.detach().to(torch.float32)
    if not bool(exact.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN")
    importance = hessian.diagonal().clone()
    order = importance.argsort(descending=True)
    wanted = exact @ (inputs.cross - hessian)
    if inputs.owed is not None:
        wanted += inputs.owed
    correction, factor = _solve(hessian, wanted, order)
    target = exact + correction
    size = scheme.group_size or columns
    scales, zeros = _ranges(target, importance, size, scheme.grid)
    spread = _spread(scales, size, order), None if zeros is None else _spread(zeros, size, order)
    restored = torch.empty_like(target)
    restored[:, order] = _round(target[:, order], spread, factor, scheme.grid)
    per_channel = scheme.granularity == "channel"
    # The values lie on the grid already, so this only turns them into codes.
    return quantize_with(
        restored,
        scheme.grid,
        scales.reshape(-1) if per_channel else scales,
        zeros,
        axis=0 if per_channel else None,
        group_size=scheme.group_size,
    )


def _solve(hessian: Tensor, wanted: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return `wanted H^-1` and the upper Cholesky factor of H^-1, its columns in that order.

    `W (Y - X) X^T H^-1` is what to add to W so that `(W + D) X` is closest to `W Y`.
    """
    for damping in _DAMPINGS:
        damped = _damped(hessian, damping)
        # One factor at a time: of 8,192 columns each is 256 MB.
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if failed:
            continue
        correction = torch.empty_like(wanted)
        correction[:, order] = torch.cholesky_solve(wanted[:, order].t(), lower).t()
        return correction, factor
    raise ValueError("the inputs in calibration are too alike to tell the columns apart")


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Return a copy whose diagonal is larger, and 1 where no input was ever seen."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    unused = diagonal <= 0
    diagonal.add_(damping * diagonal.mean()).masked_fill_(unused, 1.0)
    return damped


def _ranges(weight: Tensor, importance: Tensor, size: int, grid: Grid) -> Parameters:
    """Return storable scales, and zero points, of each group of least weighted error.

    Both are `[rows, columns / size]`.
    """
    rows = len(weight)
    groups = weight.reshape(-1, size)
    weights = importance.clamp(min=0).view(1, -1, size) + 1e-12
    least, most = groups.amin(1), groups.amax(1)

    def squares(found: Parameters) -> Tensor:
        restored = _to_grid(groups, _column(found), grid)
        return ((restored - groups).square_().view(rows, -1, size) * weights).sum(-1).view(-1)

    best = from_range(least, most, grid)
    error = torch.full_like(best[0], torch.inf)
    for factor in _FACTORS:
        found = from_range(least * factor, most * factor, grid)
        of_found = squares(found)
        better = of_found < error
        error = torch.where(better, of_found, error)
        best = _where(better, found, best)
    scales, zeros = best
    if grid.two_levels:
        scales = super_blocks.nearest(scales, lambda scales: squares((scales, None)))
    return scales.view(rows, -1), None if zeros is None else zeros.view(rows, -1)


def _spread(of_groups: Tensor, size: int, order: Tensor) -> Tensor:
    """Repeat a value of each group for its columns, in that order."""
    return of_groups.repeat_interleave(size, dim=1)[:, order]


def _where(better: Tensor, new: Parameters, old: Parameters) -> Parameters:
    zeros = None if new[1] is None or old[1] is None else torch.where(better, new[1], old[1])
    return torch.where(better, new[0], old[0]), zeros


def _column(parameters: Parameters) -> Parameters:
    scales, zeros = parameters
    return scales[:, None], None if zeros is None else zeros[:, None]


def _to_grid(values: Tensor, parameters: Parameters, grid: Grid) -> Tensor:
    """Return the nearest values that codes stand for; the parameters broadcast."""
    scales, zeros = parameters
    steps = (values / scales).round_()
    if zeros is None:
        return steps.clamp_(grid.low, grid.high).mul_(scales)
    return (steps.add_(zeros).clamp_(grid.low, grid.high).sub_(zeros)).mul_(scales)


def _round(weight: Tensor, parameters: Parameters, factor: Tensor, grid: Grid) -> Tensor:
    """Round the columns of a weight in turn; return the rounded values."""
    scales, zeros = parameters
    weight = weight.clone()
    columns = weight.shape[1]
    result = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            value = weight[:, column]
            of_column = scales[:, column], None if zeros is None else zeros[:, column]
            result[:, column] = _to_grid(value, of_column, grid)
            errors[:, column - start] = (value - result[:, column]) / factor[column, column]
            weight[:, column:end] -= errors[:, column - start, None] * factor[column, column:end]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result
