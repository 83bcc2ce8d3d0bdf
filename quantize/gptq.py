"""GPTQ: rounding that makes up, in the columns still to come, for the error of those before.

Frantar et al., arXiv 2210.17323: a linear layer's output error on calibration inputs X is
`|| (W - W^) X ||^2`, a quadratic form in each row of W with the Hessian `H = X X^T`. Columns are
rounded in turn; each one's error is spread over the columns that are not rounded yet by the rows
of the Cholesky factor of `H^-1` (algorithm 1 there), here from the column of the largest diagonal
to that of the smallest, with scales that are chosen before (their `act-order`, `static groups`).
"""

import torch
from torch import Tensor

from edgekit.quantize.affine import quantize_with
from edgekit.quantize.grid import Grid
from edgekit.quantize.scales import round_scale
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.tensor import QuantizedTensor

_DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal (section 4.1 of the paper)."""
_BLOCK = 128
"""Columns whose updates reach the rest of the matrix in one product (section 3.3, step 2)."""
# How far the range of the largest value is shrunk in the search for a scale.
_FACTORS = tuple(1 - 0.025 * step for step in range(17))


class Inputs:
    """What a linear layer sees in calibration, as two matrices `[columns, columns]`.

    With X the inputs that the quantized part of the model gives it and Y those that the float
    model gives it: the Hessian `X X^T / n` and `Y X^T / n`, summed in float32.
    """

    def __init__(self, columns: int) -> None:
        """Start without samples."""
        self._samples = 0
        self._hessian = torch.zeros(columns, columns)
        self._cross = torch.zeros(columns, columns)

    def add(self, quantized: Tensor, exact: Tensor) -> None:
        """Add inputs `[n, columns]` of the same tokens in both models."""
        self._hessian.addmm_(quantized.t(), quantized)
        self._cross.addmm_(exact.t(), quantized)
        self._samples += len(quantized)

    @property
    def hessian(self) -> Tensor:
        """`X X^T / n`; ValueError without samples or with ones that are not finite."""
        return self._mean(self._hessian)

    @property
    def cross(self) -> Tensor:
        """`Y X^T / n`; ValueError as `hessian`."""
        return self._mean(self._cross)

    def _mean(self, total: Tensor) -> Tensor:
        if not self._samples:
            raise ValueError("calibration saw no inputs of this layer")
        if not bool(total.sum().isfinite()):
            raise ValueError("calibration saw inputs that are not finite")
        return total / self._samples


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
    """Return the codes of a float weight `[rows, columns]` that GPTQ chooses for a scheme.

    What is approximated is the float layer's output on the float model's inputs, so a layer makes
    up for what the layers before it lost. Scales minimise the error weighted by the Hessian's
    diagonal. Raises ValueError for the float scheme, for shapes that do not fit and for values
    that are not finite.
    """
    columns = weight.shape[1]
    hessian = inputs.hessian
    if hessian.shape != (columns, columns):
        raise ValueError(f"expected inputs of {columns} columns, got {len(hessian)}")
    exact = weight.detach().to(torch.float32)
    if not bool(exact.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN")
    damped = _damped(hessian)
    target = exact + _correction(exact, inputs.cross - hessian, damped)
    importance = hessian.diagonal()
    size = scheme.group_size or columns
    scales = _scales(target, importance, size, scheme.grid)
    order = importance.argsort(descending=True)
    spread = scales.repeat_interleave(size, dim=1)[:, order]
    restored = torch.empty_like(target)
    restored[:, order] = _round(target[:, order], spread, _factor(damped, order), scheme.grid)
    per_channel = scheme.granularity == "channel"
    # The values lie on the grid already, so this only turns them into codes.
    return quantize_with(
        restored,
        scheme.grid,
        scales.reshape(-1) if per_channel else scales,
        axis=0 if per_channel else None,
        group_size=scheme.group_size,
    )


def _damped(hessian: Tensor) -> Tensor:
    """Return a copy whose diagonal is larger, and 1 where no input was ever seen."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    unused = diagonal <= 0
    diagonal.add_(_DAMPING * diagonal.mean()).masked_fill_(unused, 1.0)
    return damped


def _correction(weight: Tensor, difference: Tensor, damped: Tensor) -> Tensor:
    """Return what to add to W so that `(W + D) X` is closest to `W Y`: `W (Y - X) X^T H^-1`."""
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve((weight @ difference).t(), factor).t()


def _scales(weight: Tensor, importance: Tensor, size: int, grid: Grid) -> Tensor:
    """Return the storable scale of each group `[rows, columns / size]` of least weighted error."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // size, size)
    weights = importance.clamp(min=0).view(1, -1, size) + 1e-12
    largest = torch.maximum(groups.amax(-1) / grid.high, groups.amin(-1) / grid.low).clamp(min=0)
    best = round_scale(largest)
    error = torch.full_like(best, torch.inf)
    for factor in _FACTORS:
        scale = round_scale(largest * factor)
        codes = (groups / scale[..., None]).round_().clamp_(grid.low, grid.high)
        found = ((codes * scale[..., None] - groups).square_() * weights).sum(-1)
        better = found < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best


def _factor(damped: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, in that order."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round(weight: Tensor, scales: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Round the columns of a weight in turn; return the rounded values."""
    weight = weight.clone()
    columns = weight.shape[1]
    result = torch.empty_like(weight)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            value, scale = weight[:, column], scales[:, column]
            result[:, column] = (value / scale).round_().clamp_(grid.low, grid.high) * scale
            errors[:, column - start] = (value - result[:, column]) / factor[column, column]
            weight[:, column:end] -= errors[:, column - start, None] * factor[column, column:end]
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result
