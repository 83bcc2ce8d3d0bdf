"""Optimal Brain Surgeon, which GPTQ is a fast form of: a check of codes that no tie can fail."""

import torch
from torch import Tensor

from edgekit.quantize.by_scheme import grid_of
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.tensor import QuantizedTensor

# Half a step, and what sums in float32 may be off by.
NEAREST = 0.5 + 0.01


def steps_from_elimination(
    found: QuantizedTensor, weight: Tensor, samples: Tensor, wanted: Tensor, scheme: Scheme
) -> float:
    """Return how far, at most, a code lies from the value that it rounds, in steps; all in float64.

    `weight` is `[rows, columns]`, `samples` `[n, columns]` the inputs, `wanted` `[n, rows]` the
    outputs to give. After each column, what is left of the Hessian is inverted anew. What is left
    to round follows from the codes before: a value on the edge between two codes, which the order
    of a float32 sum puts to either side, is then no reason for the codes after it to differ.
    """
    exact, inputs = weight.double(), samples.double()
    rows, columns = weight.shape
    hessian = inputs.t() @ inputs / len(inputs)
    order = hessian.diagonal().argsort(descending=True).tolist()
    lacking = (wanted.double() - inputs @ exact.t()).t() @ inputs / len(inputs)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    left = exact + torch.linalg.solve(hessian, lacking, left=False)
    scales = found.scales.double().reshape(rows, -1)
    zeros = torch.zeros_like(scales) if found.zero_points is None else found.zero_points.double()
    restored, farthest = found.dequantize().double(), 0.0
    while order:
        inverse = torch.linalg.inv(hessian[order][:, order])
        column, *rest = order
        group = column * scales.shape[1] // columns
        value = left[:, column] / scales[:, group] + zeros[:, group]
        value = value.clamp(grid_of(scheme).low, grid_of(scheme).high)
        farthest = max(farthest, float((value - found.codes[:, column]).abs().max()))
        error = (left[:, column] - restored[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0, 1:]
        order = rest
    return farthest
