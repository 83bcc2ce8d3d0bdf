"""The error of a linear layer's output in calibration, as a function of its weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.quantize.gptq import DAMPING, Inputs


@dataclass(frozen=True, eq=False)
class OutputError:
    """`|| W^ X - Z ||^2 / n + d || W^ - W ||^2`, up to a constant `tr(W^ H W^T) - 2 tr(W^ G^T)`.

    X are the inputs that the quantized part of the model gives the layer, Z what it should give
    (`edgekit.quantize.gptq.Inputs`). `hessian` H is `X X^T / n + d I` `[columns, columns]`,
    `wanted` G is `Z X^T / n + d W` `[rows, columns]`: d, GPTQ's damping, holds the weight to the
    float one.
    """

    hessian: Tensor
    wanted: Tensor

    @classmethod
    def of(cls, weight: Tensor, inputs: Inputs) -> "OutputError":
        """Return the error of a float weight's approximations; ValueError as `Inputs.hessian`."""
        hessian = inputs.hessian_of(weight)
        damping = DAMPING * float(hessian.diagonal().mean()) or 1.0  # 1: no input was ever seen
        damped = hessian + damping * torch.eye(len(hessian))
        return cls(damped, inputs.lacking(weight, hessian) + weight @ damped)

    @property
    def importance(self) -> Tensor:
        """The diagonal of the Hessian `[columns]`: what an error of one weight costs."""
        return self.hessian.diagonal()

    def gradient(self, weight: Tensor) -> Tensor:
        """Return half the gradient `W^ H - G` of the error at a weight."""
        return weight @ self.hessian - self.wanted

    def __call__(self, weight: Tensor) -> float:
        """Return the error of a weight less that of `W^ = 0`."""
        return float(((weight @ self.hessian - 2 * self.wanted) * weight).sum())
