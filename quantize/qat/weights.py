"""The fake quantization of one weight, and its codes in the end."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.quantize.affine import as_ranges, choose, from_ranges, quantize, quantize_with
from edgekit.quantize.grid import Grid
from edgekit.quantize.qat.straight_through import fake_quantize_rows, round_scales
from edgekit.quantize.ranges import Parameters, RangeMethod
from edgekit.quantize.tensor import QuantizedTensor, scales_shape


class WeightQuantizer:
    """Rounds a weight as the quantizer of its scheme does, bit for bit, with a gradient.

    name                what messages call the weight
    grid, axis, ...     as `quantize` takes them
    learned             the scales as a parameter (learned step size, arXiv 1902.08153), or None;
                        they are rounded to the storable grid wherever they are used
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        axis: int | None,
        group_size: int | None,
        method: RangeMethod,
    ) -> None:
        self.name = name
        self.learned: nn.Parameter | None = None
        self._grid, self._axis, self._group_size, self._method = grid, axis, group_size, method
        self._searches = method == "mse"  # which costs as much as ten roundings
        self._zeros: Tensor | None = None
        self._kept: tuple[int, Parameters] | None = None

    def learn(self, weight: Tensor) -> nn.Parameter:
        """Make the scales a parameter that starts at those of the scheme's range.

        Zero points stay what they are at the start.
        """
        scales, self._zeros = self._choose(weight)
        self.learned = nn.Parameter(scales)
        return self.learned

    def fake(self, weight: Tensor, period: int | None = None) -> tuple[Tensor, Tensor]:
        """Return what the weight's codes stand for, and the scales `[ranges]`.

        Ranges that are searched for stay the same within a `period`, unless that is None.
        EdgekitError for a weight that cannot be quantized.
        """
        rows = as_ranges(weight, self._axis, self._group_size)
        if self.learned is not None:
            scales, zeros = round_scales(self.learned, self._grid.scales), self._zeros
        else:
            scales, zeros = self._parameters(weight, period)
        # Each scale's gradient is balanced against those of its weights (section 2.2 there).
        step_gradient = 1 / math.sqrt(rows.shape[1] * self._grid.high)
        limits = (self._grid.low, self._grid.high)
        values = fake_quantize_rows(rows, scales, zeros, limits, step_gradient)
        return from_ranges(values, weight, self._axis).to(weight.dtype), scales.detach()

    def codes(self, weight: Tensor) -> QuantizedTensor:
        """Return the codes; EdgekitError for a weight that cannot be quantized."""
        weight = weight.detach().cpu()
        try:
            if self.learned is None:
                return quantize(
                    weight,
                    self._grid,
                    axis=self._axis,
                    group_size=self._group_size,
                    method=self._method,
                )
            shape = scales_shape(tuple(weight.shape), self._axis, self._group_size)
            scales = round_scales(self.learned.detach().cpu(), self._grid.scales)
            zeros = None if self._zeros is None else self._zeros.cpu().reshape(shape)
            return quantize_with(
                weight,
                self._grid,
                scales.reshape(shape),
                zeros,
                axis=self._axis,
                group_size=self._group_size,
            )
        except ValueError as error:
            raise EdgekitError(f"{self.name}: cannot be quantized: {error}") from error

    def state(self) -> dict[str, Any]:
        """Return the learned scales, or the ranges that training keeps for some steps."""
        if self.learned is not None:
            return {"learned": self.learned.detach().clone()}
        if self._kept is None:
            return {}
        period, (scales, zeros) = self._kept
        return {"kept": [period, scales, zeros]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        if self.learned is not None:
            with torch.no_grad():
                self.learned.copy_(state["learned"])
        self._kept = None
        if "kept" in state:
            period, scales, zeros = state["kept"]
            if not isinstance(scales, Tensor) or not isinstance(zeros, Tensor | None):
                raise TypeError("kept ranges are no tensors")
            self._kept = int(period), (scales, zeros)

    def _parameters(self, weight: Tensor, period: int | None) -> Parameters:
        if period is None or not self._searches:
            return self._choose(weight)
        if self._kept is None or self._kept[0] != period:
            self._kept = period, self._choose(weight)
        return self._kept[1]

    def _choose(self, weight: Tensor) -> Parameters:
        try:
            with torch.no_grad():
                return choose(weight, self._grid, self._axis, self._group_size, self._method)
        except ValueError as error:
            raise EdgekitError(f"{self.name}: cannot be quantized: {error}") from error
