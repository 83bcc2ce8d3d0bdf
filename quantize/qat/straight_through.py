"""Rounding with a gradient: the straight-through estimator (arXiv 1806.08342, section 2.4).

The gradient passes where the code is not clamped and is 0 elsewhere. At both ends that is half a
step more than [min, max], as in `torch.fake_quantize_per_tensor_affine`: with [min, max] itself
the largest weight of each channel would get no gradient, for the range ends at it.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from edgekit.quantize.observers import LEVELS, ActivationParameters
from edgekit.quantize.qat.opaque import storable
from edgekit.quantize.scales import ScaleGrid


def fake_quantize_activation(values: Tensor, parameters: ActivationParameters) -> Tensor:
    """Return what `ActivationParameters.fake_quantize` does, with the estimator's gradient."""
    result: Tensor = _Activation.apply(values, parameters.scale, parameters.zero_point)  # type: ignore[no-untyped-call]
    return result


def fake_quantize_rows(
    rows: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    limits: tuple[int, int],
    step_gradient: float = 1.0,
) -> Tensor:
    """Return what the codes of weights [ranges, elements] stand for, one scale for each range.

    The gradient of `scales` [ranges] is that of a learned step size (arXiv 1902.08153, equation
    3) times `step_gradient`: `round(w / s) - w / s` inside, the clamped code outside.
    """
    zeros = None if zero_points is None else zero_points[:, None]
    result: Tensor = _Rows.apply(rows, scales[:, None], zeros, limits, step_gradient)  # type: ignore[no-untyped-call]
    return result


def round_scales(scales: Tensor, grid: ScaleGrid) -> Tensor:
    """Return learned scales [ranges] on the storable grid; the gradient passes."""
    result: Tensor = _Scales.apply(scales, grid)  # type: ignore[no-untyped-call]
    return result


def rounded(values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `rounding(values)`; the gradient passes as if nothing were rounded."""
    result: Tensor = _Identity.apply(values, rounding)  # type: ignore[no-untyped-call]
    return result


class Context(Protocol):
    """What torch gives a function: a place for what the gradient needs."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    step_gradient: float

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the gradient."""
        ...


class _Activation(Function):
    @staticmethod
    def forward(ctx: Context, values: Tensor, scale: float, zero_point: int) -> Tensor:
        codes = (values / scale).round_().add_(zero_point)
        clamped = codes.clamp(0, LEVELS - 1)
        ctx.save_for_backward(codes.eq(clamped))
        return clamped.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class _Rows(Function):
    @staticmethod
    def forward(
        ctx: Context,
        rows: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        limits: tuple[int, int],
        step_gradient: float,
    ) -> Tensor:
        exact = rows / scales
        codes = exact.round()
        if zeros is not None:
            codes += zeros
        steps = codes.clamp(*limits)
        inside = codes.eq(steps)
        if zeros is not None:
            steps -= zeros
        slope = torch.where(inside, steps - exact, steps) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope)
        ctx.step_gradient = step_gradient
        return steps.mul_(scales)

    @staticmethod
    def backward(
        ctx: Context, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        inside, slope = ctx.saved_tensors
        of_scales = None
        if slope is not None:
            of_scales = (gradients[0] * slope).sum(dim=1, keepdim=True) * ctx.step_gradient
        return gradients[0] * inside, of_scales, None, None, None


class _Scales(Function):
    @staticmethod
    def forward(ctx: Context, scales: Tensor, grid: ScaleGrid) -> Tensor:
        # The grid's rounding reads the bits of positive numbers; a step may have gone below 0.
        return storable(scales.clamp(0, grid.largest), grid)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Identity(Function):
    @staticmethod
    def forward(ctx: Context, values: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        return rounding(values)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
