"""What integer kernels make of codes, to the last bit: exact sums, then one rounding in float32.

Sums of products of codes are whole numbers, which float64 holds exactly whatever the order. What
follows is ONNX Runtime's on x86-64 with AVX2 (1.32): `MlasRequantizeOutput` of MLAS's quantize.cpp
for layers (which is XNNPACK's fp32 requantization, too), qladd_avx2.cpp, qlmul.cpp, qlgavgpool.cpp,
and contrib_ops/cpu/quantization/qlinear_pool.cc. Other kernels (NEON's and XNNPACK's additions have
20-bit factors, XNNPACK pools floats) part from it near ties only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from edgekit.quantize.observers import LEVELS, ActivationParameters
from edgekit.quantize.traced.operators import (
    AVERAGES,
    CLAMPS,
    LINEAR,
    arguments,
    aten,
    numbers,
)
from edgekit.quantize.traced.placement import end_of_chain

Edge = Callable[[Node], ActivationParameters | None]
"""From a node to the parameters of its codes; None where it has none."""


@dataclass(frozen=True)
class Unrounded:
    """Values before they are rounded: `code = clamp(round(values) + offset, low, high)`.

    Kernels add the zero point before they round (`offset` is then 0) or after: ties show it.
    """

    values: Tensor
    offset: int
    low: float = 0.0
    high: float = LEVELS - 1.0

    def codes(self) -> Tensor:
        """Return the codes, float32 whole numbers; ties go to the even number."""
        return self.values.round().add_(self.offset).clamp_(self.low, self.high)

    def moved(self, by: Tensor) -> "Unrounded":
        """Return the values with something added to each, in steps."""
        return replace(self, values=self.values + by)

    def clamped(self, low: float, high: float) -> "Unrounded":
        """Return the values of a clamp that is fused, its ends given as codes."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    def distance(self, codes: Tensor) -> Tensor:
        """Return how far codes are from what is rounded: up to a half where they are honest."""
        return (codes - (self.values + self.offset).clamp(self.low, self.high)).abs()


@dataclass(frozen=True)
class LayerCodes:
    """A layer's parameters on whole numbers.

    weight  codes less zero points, in the weight's shape
    bias    codes [channels] in `units`, or None
    units   input scale times weight scale, float32 [channels] or []
    """

    weight: Tensor
    bias: Tensor | None
    units: Tensor


class Kernels:
    """Runs the nodes of one pass that engines run on integers."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self._before_clamp: dict[Node, Unrounded] = {}

    def run(self, node: Node, args: tuple[Any, ...], layer: LayerCodes | None) -> Unrounded | None:
        """Return what is rounded to the codes that leave the kernel; None for a float operator.

        `args` are the node's arguments with values in place of nodes. The kernel of a layer or an
        addition that a clamp follows ends in the clamp.
        """
        if node.target in CLAMPS and (found := self._before_clamp.pop(_first(node), None)):
            return self._clamp(node, found)
        leaving = self._edge(end_of_chain(node))
        if node.op != "call_function" or leaving is None:
            return None
        found = self._layer(node, args, layer, leaving) if layer else self._on(node, args, leaving)
        if found is not None and self._edge(node) is None:
            self._before_clamp[node] = found
        return found

    def _layer(
        self, node: Node, args: tuple[Any, ...], layer: LayerCodes, leaving: ActivationParameters
    ) -> Unrounded:
        entering = self._edge(_first(node))
        assert entering is not None
        return of_layer(node, steps_of(args[0], entering), args[3:], layer, leaving)

    def _on(
        self, node: Node, args: tuple[Any, ...], leaving: ActivationParameters
    ) -> Unrounded | None:
        if node.target not in (*_PAIRS, *AVERAGES):
            return None
        operands = node.args[: 2 if node.target in _PAIRS else 1]
        edges = [self._edge(item) if isinstance(item, Node) else None for item in operands]
        entering = [edge for edge in edges if edge is not None]
        if len(entering) < len(operands) or arguments(node).get("alpha", 1) != 1:
            return None
        steps = [steps_of(item, edge) for item, edge in zip(args, entering, strict=False)]
        if node.target in AVERAGES:
            return of_average(node, steps[0], leaving)
        return _PAIRS[node.target](steps[0], steps[1], entering, leaving)

    def _clamp(self, node: Node, found: Unrounded) -> Unrounded:
        parameters = self._edge(node)
        assert parameters is not None
        ends = torch.tensor(clamp_ends(node))
        return found.clamped(*parameters.codes(ends).tolist())


def clamp_ends(node: Node) -> list[float]:
    """Return where a clamp ends; a ReLU has no upper end."""
    if node.target == aten.hardtanh.default:
        found = arguments(node)
        return [float(found["min_val"]), float(found["max_val"])]
    if node.target == aten.relu6.default:
        return [0.0, 6.0]
    return [0.0, torch.finfo(torch.float32).max]


def of_floats(values: Tensor, leaving: ActivationParameters) -> Unrounded:
    """Return what QuantizeLinear rounds of float32 values."""
    return Unrounded(values / leaving.scale, leaving.zero_point)


def steps_of(values: Tensor, parameters: ActivationParameters) -> Tensor:
    """Return values that codes stand for as whole numbers of steps: the codes less zero point."""
    return (values / parameters.scale).round_()


def of_layer(
    node: Node,
    steps: Tensor,
    rest: tuple[Any, ...],
    layer: LayerCodes,
    leaving: ActivationParameters,
) -> Unrounded:
    """Run a layer on whole numbers; `rest` are the operator's arguments behind the bias."""
    weight = layer.weight.double()
    sums = node.target(steps.double(), weight, None, *rest, **node.kwargs).round_()  # type: ignore[operator]
    shape = [-1] if node.target == LINEAR else [-1, *[1] * (sums.ndim - 2)]
    if layer.bias is not None:
        sums += layer.bias.double().view(shape)
    factor = layer.units / leaving.scale
    return Unrounded(sums.float() * factor.view(shape if factor.ndim else []), leaving.zero_point)


def of_sum(
    a: Tensor,
    b: Tensor,
    entering: Sequence[ActivationParameters],
    leaving: ActivationParameters,
) -> Unrounded:
    """Add steps: the factor of each in float32, products and sums fused in one rounding."""
    first, second = (torch.tensor(each.scale) / leaving.scale for each in entering)
    zeros = _fused(
        first, torch.tensor(entering[0].zero_point), second * float(entering[1].zero_point)
    )
    fixed = leaving.zero_point - zeros
    sums = _fused(b + entering[1].zero_point, second, fixed)
    return Unrounded(_fused(a + entering[0].zero_point, first, sums), 0)


def of_product(
    a: Tensor,
    b: Tensor,
    entering: Sequence[ActivationParameters],
    leaving: ActivationParameters,
) -> Unrounded:
    """Multiply steps."""
    factor = torch.tensor(entering[0].scale) * entering[1].scale / leaving.scale
    return Unrounded(a * b * factor + leaving.zero_point, 0)


def of_average(node: Node, steps: Tensor, parameters: ActivationParameters) -> Unrounded:
    """Run an operator of `AVERAGES`, whose result has its operand's parameters."""
    found = arguments(node)
    if node.target == aten.mean.dim:
        sums = steps.sum(found["dim"], keepdim=found["keepdim"], dtype=torch.float64)
        return _of_total(sums, steps.numel() // max(sums.numel(), 1), parameters)
    if node.target == aten.avg_pool2d.default:
        if found["divisor_override"] is not None:
            mean = aten.avg_pool2d.default(steps.double(), *node.args[1:], **node.kwargs)
            return Unrounded(mean.float(), parameters.zero_point)
        kernel = numbers(found["kernel_size"], 2)
        stride = numbers(found["stride"], 2) if found["stride"] else kernel
        padding = numbers(found["padding"], 2)
        sizes = node.target(steps[:1, :1], *node.args[1:], **node.kwargs).shape[-2:]
        return _of_windows(
            steps, kernel, stride, padding, sizes, found["count_include_pad"], parameters
        )
    wanted = numbers(found["output_size"], 2)
    taps = [size // count for size, count in zip(steps.shape[-2:], wanted, strict=True)]
    if wanted == [1, 1]:
        return _of_total(
            steps.sum((-2, -1), keepdim=True, dtype=torch.float64), taps[0] * taps[1], parameters
        )
    if [tap * count for tap, count in zip(taps, wanted, strict=True)] != list(steps.shape[-2:]):
        mean = node.target(steps.double(), wanted)  # type: ignore[operator]
        return Unrounded(mean.float(), parameters.zero_point)
    return _of_windows(steps, taps, taps, [0, 0], wanted, True, parameters)


Pair = Callable[[Tensor, Tensor, Sequence[ActivationParameters], ActivationParameters], Unrounded]
_PAIRS: dict[Any, Pair] = {aten.add.Tensor: of_sum, aten.mul.Tensor: of_product}


def _first(node: Node) -> Node:
    """Return a node's first operand, a tensor's."""
    found = node.args[0]
    assert isinstance(found, Node)
    return found


def _of_total(sums: Tensor, count: int, parameters: ActivationParameters) -> Unrounded:
    scale = torch.tensor(parameters.scale)
    factor = scale / (scale * float(count))
    return Unrounded(sums.float() * factor, parameters.zero_point)


def _of_windows(
    steps: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    sizes: Sequence[int],
    with_padding: bool,
    parameters: ActivationParameters,
) -> Unrounded:
    """Sum what the codes stand for in float32, row by row, which decides ties."""
    reach = [(count - 1) * by + taps for count, by, taps in zip(sizes, stride, kernel, strict=True)]
    padded = [size + 2 * pad for size, pad in zip(steps.shape[-2:], padding, strict=True)]
    inner = [padding[1], padding[1], padding[0], padding[0]]
    outer = [0, max(reach[1] - padded[1], 0), 0, max(reach[0] - padded[0], 0)]
    counted = functional.pad(
        torch.ones_like(steps[:1, :1]), inner, value=1.0 if with_padding else 0.0
    )
    values, counted = (
        functional.pad(item, outer)
        for item in (functional.pad(steps * parameters.scale, inner), counted)
    )
    sums, counts = torch.zeros(()), torch.zeros(())
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            window = (
                ...,
                slice(row, row + (sizes[0] - 1) * stride[0] + 1, stride[0]),
                slice(column, column + (sizes[1] - 1) * stride[1] + 1, stride[1]),
            )
            sums, counts = sums + values[window], counts + counted[window]
    return Unrounded(sums / counts / parameters.scale + parameters.zero_point, 0)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return `a * b + c` of float32 with one rounding: float64 holds products of codes exactly."""
    return (a.double() * b.double() + c.double()).float()
