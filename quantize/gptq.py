"""GPTQ: rounding that makes up, in the columns still to come, for the error of those before.

Frantar et al., arXiv 2210.17323: a linear layer's output error on calibration inputs X is
`|| (W - W^) X ||^2`, a quadratic form in each row of W with the Hessian `H = X X^T`. Columns are
rounded in turn, each after what it takes over of the errors of those before it; here from the
column of the largest diagonal to that of the smallest, with scales that are chosen before (their
`act-order`, `static groups`).

What it takes over is computed from the Cholesky factor of H itself: with `H = L L^T` column j takes
over `L[k, j] / L[j, j]` of the error of each column k that is rounded before it, those being the
ones behind it in L. That is the same rounding as algorithm 1 there (Chee et al., arXiv 2307.13304,
theorem 6), which inverts H and factorises the inverse.
"""

import torch
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.by_scheme import grid_of
from edgekit.quantize.grid import Grid
from edgekit.quantize.ranges import Parameters, from_range
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.tensor import CHUNK_ELEMENTS, QuantizedTensor

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to the diagonal: the paper's (section 4.1)."""
_DAMPINGS = (DAMPING, 0.1, 1.0)
"""More where float32 cannot factorise the sum."""
_BLOCK = 128
"""Columns that take over the errors of all before them in one product (section 3.3, step 2)."""
_PANEL = 512
"""Rows of the Hessian that are summed together, as far as its diagonal."""
# How far the range of the largest value is shrunk in the search for a scale.
_FACTORS = tuple(1 - 0.025 * step for step in range(17))


class Inputs:
    """What a linear layer sees in calibration, as matrices of sums over the samples.

    With X the inputs that the quantized part of the model gives it and Z what its outputs should
    be: the Hessian `X X^T / n` `[columns, columns]` and `Z X^T / n` `[rows, columns]`, summed in
    float32. Z is either `W Y`, with Y the inputs that the float model gives it (`add_inputs`), or
    given itself, where the outputs make up for a residual too (`add_outputs`).
    """

    def __init__(self, columns: int) -> None:
        """Start without samples."""
        self._samples = 0
        self._hessian = torch.zeros(columns, columns)  # above the diagonal's blocks not summed
        self._meant: Tensor | None = None
        self._wanted: Tensor | None = None

    def add_inputs(self, seen: Tensor, meant: Tensor) -> None:
        """Add inputs `[n, columns]` of the same tokens in the quantized and in the float model.

        ValueError after `add_outputs`: one layer's samples are all given in one way.
        """
        if self._wanted is not None:
            raise ValueError("samples were added by their outputs: add all in one way")
        self._meant = _add_product(self._meant, meant, seen)
        self._add_seen(seen)

    def add_outputs(self, seen: Tensor, wanted: Tensor) -> None:
        """Add inputs `[n, columns]` in the quantized model and the outputs `[n, rows]` to give.

        ValueError after `add_inputs`: one layer's samples are all given in one way.
        """
        if self._meant is not None:
            raise ValueError("samples were added by their inputs: add all in one way")
        self._wanted = _add_product(self._wanted, wanted, seen)
        self._add_seen(seen)

    def _add_seen(self, seen: Tensor) -> None:
        for start in range(0, len(self._hessian), _PANEL):
            end = start + _PANEL
            self._hessian[start:end, :end].addmm_(seen[:, start:end].t(), seen[:, :end])
        self._samples += len(seen)

    @property
    def hessian(self) -> Tensor:
        """`X X^T / n`; ValueError without samples or with ones that are not finite."""
        for start in range(0, len(self._hessian), _PANEL):
            end = start + _PANEL
            self._hessian[start:end, end:] = self._hessian[end:, start:end].t()
        return self._mean(self._hessian)

    def hessian_of(self, weight: Tensor) -> Tensor:
        """Return `hessian`; ValueError where it is not of a weight `[rows, columns]`."""
        hessian = self.hessian
        if len(hessian) != weight.shape[1]:
            raise ValueError(f"expected inputs of {weight.shape[1]} columns, got {len(hessian)}")
        return hessian

    def lacking(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Return `(Z - W X) X^T / n` for a float weight `[rows, columns]`, given its `hessian`."""
        if self._wanted is not None:
            return (weight @ hessian).neg_().add_(self._mean(self._wanted))
        if self._meant is None:
            raise ValueError("calibration saw no inputs of this layer")
        return weight @ (self._mean(self._meant) - hessian)

    def _mean(self, total: Tensor) -> Tensor:
        if not self._samples:
            raise ValueError("calibration saw no inputs of this layer")
        if not bool(total.sum().isfinite()):
            raise ValueError("calibration saw inputs that are not finite")
        return total / self._samples


def gptq(weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
    """Return the codes of a float weight `[rows, columns]` that GPTQ chooses for a scheme.

    What is approximated are the outputs Z of `Inputs`, so a layer makes up for what the layers
    before it lost. Ranges minimise the error weighted by the Hessian's diagonal. Raises ValueError
    for the float scheme, for shapes that do not fit and for values that are not finite.
    """
    columns = weight.shape[1]
    hessian = inputs.hessian_of(weight)
    exact = weight.detach().to(torch.float32)
    if not bool(exact.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN")
    importance = hessian.diagonal().clone()
    order = importance.argsort()
    lacking = inputs.lacking(exact, hessian)
    factor = _factor(hessian, order)
    del hessian  # of 8,192 columns 256 MB
    # `(Z - W X) X^T H^-1` is what to add to W so that `(W + D) X` is closest to Z.
    lacking[:, order] = torch.cholesky_solve(lacking[:, order].t(), factor).t()
    target = exact + lacking
    size = scheme.group_size or columns
    scales, zeros = _ranges(target, importance, size, grid_of(scheme))
    codes = _round(target, (scales, zeros), factor, order, grid_of(scheme))
    per_channel = scheme.granularity == "channel"
    return QuantizedTensor(
        codes,
        scales.flatten() if per_channel else scales,
        zeros,
        bits=grid_of(scheme).bits,
        group_size=scheme.group_size,
        axis=0 if per_channel else None,
    )


def _factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return the lower Cholesky factor of the damped Hessian, its columns in that order.

    A column of which no input was ever seen has a diagonal of 1.
    """
    ordered = hessian[order][:, order]
    diagonal = ordered.diagonal()
    seen = diagonal.clone()
    for damping in _DAMPINGS:
        diagonal.copy_(torch.where(seen > 0, seen + damping * seen.mean(), 1.0))
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            return factor
    raise ValueError("the inputs in calibration are too alike to tell the columns apart")


def _ranges(weight: Tensor, importance: Tensor, size: int, grid: Grid) -> Parameters:
    """Return storable scales, and zero points, of each group of least weighted error.

    Both are `[rows, columns / size]`.
    """
    weights = (importance.clamp(min=0) + 1e-12).view(-1, size)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    found = [
        _ranges_of(part.unflatten(1, (-1, size)), weights, grid) for part in weight.split(rows)
    ]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _ranges_of(groups: Tensor, weights: Tensor, grid: Grid) -> Parameters:
    """Do it for some rows, as `[rows, groups, size]`."""
    least, most = groups.amin(-1), groups.amax(-1)

    def squares(found: Parameters) -> Tensor:
        return _to_grid(groups, found, grid).sub_(groups).square_().mul_(weights).sum(-1)

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
    return scales, zeros


def _where(better: Tensor, new: Parameters, old: Parameters) -> Parameters:
    zeros = None if new[1] is None or old[1] is None else torch.where(better, new[1], old[1])
    return torch.where(better, new[0], old[0]), zeros


def _to_grid(groups: Tensor, parameters: Parameters, grid: Grid) -> Tensor:
    """Return the nearest values that codes stand for."""
    scales, zeros = parameters
    steps = (groups / scales[..., None]).round_()
    if zeros is None:
        steps.clamp_(grid.low, grid.high)
    else:
        steps.add_(zeros[..., None]).clamp_(grid.low, grid.high).sub_(zeros[..., None])
    return steps.mul_(scales[..., None])


def _round(
    target: Tensor, parameters: Parameters, factor: Tensor, order: Tensor, grid: Grid
) -> Tensor:
    """Return the codes of a matrix, whose columns are rounded from the last in that order on."""
    # Transposed, so that a column lies in one piece. Of those that are rounded the error stays.
    left = target.t().contiguous()[order]
    scales, zeros = (None if each is None else each.t().float() for each in parameters)
    assert scales is not None
    groups = (order // (len(order) // len(scales))).tolist()
    codes = torch.empty_like(left, dtype=grid.dtype)
    for end in range(len(order), 0, -_BLOCK):
        start = max(0, end - _BLOCK)
        shares = factor[start:, start:end] / factor.diagonal()[start:end]
        values = torch.addmm(left[start:end], shares[end - start :].t(), left[end:])
        for column in reversed(range(start, end)):
            place = column - start
            value = values[place]
            value.addmv_(left[column + 1 : end].t(), shares[place + 1 : end - start, place])
            scale = scales[groups[column]]
            steps = (value / scale).round_()
            if zeros is None:
                codes[column] = steps.clamp_(grid.low, grid.high)
            else:
                zero = zeros[groups[column]]
                codes[column] = steps.add_(zero).clamp_(grid.low, grid.high)
                steps.sub_(zero)
            left[column].addcmul_(steps, scale, value=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add `left^T right` to a sum, in place where there is one already."""
    return left.t() @ right if total is None else total.addmm_(left.t(), right)
