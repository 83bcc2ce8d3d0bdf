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
_FACTORS = tuple(1 - 0.025 * step for step in range(0, 17))


class Hessian:
    """`X X^T / samples` of the inputs `[n, columns]` of a linear layer, summed in float32."""

    def __init__(self, columns: int) -> None:
        """Start without samples."""
        self.samples = 0
        self._sum = torch.zeros(columns, columns)

    def add(self, inputs: Tensor) -> None:
        """Add inputs `[..., columns]`."""
        rows = inputs.detach().reshape(-1, self._sum.shape[0]).to(torch.float32)
        self._sum.addmm_(rows.t(), rows)
        self.samples += len(rows)

    def mean(self) -> Tensor:
        """Return the matrix `[columns, columns]`; ValueError without samples or with NaN."""
        if not self.samples:
            raise ValueError("calibration saw no inputs of this layer")
        if not bool(self._sum.diagonal().isfinite().all()):
            raise ValueError("calibration saw inputs that are not finite")
        return self._sum / self.samples


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Return the codes of a float weight `[rows, columns]` that GPTQ chooses for a scheme.

    `hessian` is that of the layer's inputs, `[columns, columns]`. Scales minimise the error
    weighted by its diagonal. Columns that calibration never used are rounded to nearest. Raises
    ValueError for the float scheme, shapes that do not fit, and values that are not finite.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"expected a Hessian of {columns} columns, got {tuple(hessian.shape)}")
    exact = weight.detach().to(torch.float32)
    if not bool(exact.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN")
    size = scheme.group_size or columns
    scales = _scales(exact, hessian.diagonal(), size, scheme.grid)
    order = hessian.diagonal().argsort(descending=True)
    spread = scales.repeat_interleave(size, dim=1)[:, order]
    rounded = _round(exact[:, order], spread, _factor(hessian, order), scheme.grid)
    restored = torch.empty_like(exact)
    restored[:, order] = rounded
    # The values lie on the grid already, so this only turns them into codes.
    per_channel = scheme.granularity == "channel"
    return quantize_with(
        restored,
        scheme.grid,
        scales.reshape(-1) if per_channel else scales,
        axis=0 if per_channel else None,
        group_size=scheme.group_size,
    )


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


def _factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, in that order."""
    matrix = hessian[order][:, order].clone()
    diagonal = matrix.diagonal()
    unused = diagonal <= 0
    damping = _DAMPING * diagonal.mean().clamp(min=1e-12)
    diagonal.add_(damping).masked_fill_(unused, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True)


def _round(weight: Tensor, scales: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Round the columns of a weight, which is used up, in turn; return the rounded values."""
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
