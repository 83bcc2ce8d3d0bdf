"""The fake quantization of one weight, and its codes in the end."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.quantize.affine import as_ranges, from_ranges, quantize, quantize_with
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.qat.carried import Carried
from edgekit.quantize.qat.opaque import choose_ranges
from edgekit.quantize.qat.straight_through import fake_quantize_rows, round_scales
from edgekit.quantize.ranges import Parameters
from edgekit.quantize.schemes.sizes import scales_shape
from edgekit.quantize.tensor import QuantizedTensor


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
        self.learned: Carried | None = None
        self._grid, self._axis, self._group_size, self._method = grid, axis, group_size, method
        self._searches = method == "mse"  # which costs as much as ten roundings
        self._zeros: Tensor | None = None
        self._kept: Parameters | None = None

    def learn(self, weight: Tensor, owner: nn.Module, name: str) -> None:
        """Make the scales a parameter that starts at those of the scheme's range.

        `owner` carries them under `name`. Zero points stay what they are at the start.
        """
        scales, self._zeros = self._choose(weight)
        self.learned = Carried(owner, name, nn.Parameter(scales))

    def check_learned(self) -> None:
        """Raise EdgekitError where learned scales are no parameter any more."""
        if self.learned is not None and not isinstance(self.learned.values, nn.Parameter):
            raise EdgekitError(
                f"{self.name}: the model was moved or converted after its learned scales were "
                "given to the optimizer: make the optimizer anew, with parameters() again"
            )

    def fake(self, weight: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
        """Return what the weight's codes stand for, and the scales `[ranges]`.

        With `keep`, ranges that are searched for stay the same until `renew`. EdgekitError for a
        weight that cannot be quantized.
        """
        rows = as_ranges(weight, self._axis, self._group_size)
        if self.learned is not None:
            scales, zeros = round_scales(self.learned.values, self._grid.scales), self._zeros
        else:
            scales, zeros = self._parameters(weight, keep)
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
            scales = round_scales(self.learned.values.detach().cpu(), self._grid.scales)
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
            return {"learned": self.learned.values.detach().clone()}
        return {} if self._kept is None else {"kept": list(self._kept)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        if self.learned is not None:
            self.learned.write(state["learned"])
        self._kept = None
        if "kept" in state:
            scales, zeros = state["kept"]
            if not isinstance(scales, Tensor) or not isinstance(zeros, Tensor | None):
                raise TypeError("kept ranges are no tensors")
            self._kept = scales, zeros

    def renew(self) -> None:
        """Search for ranges anew when they are needed next."""
        self._kept = None

    def remove(self) -> None:
        """Take learned scales out of the module that carries them."""
        if self.learned is not None:
            self.learned.remove()

    def _parameters(self, weight: Tensor, keep: bool) -> Parameters:
        if not keep or not self._searches:
            return self._choose(weight)
        if self._kept is None:
            self._kept = self._choose(weight)
        return self._kept

    def _choose(self, weight: Tensor) -> Parameters:
        return choose_ranges(
            self.name, weight, self._grid, self._axis, self._group_size, self._method
        )
