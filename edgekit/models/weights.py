"""A weight as model code sees it: codes or floats, by its checkpoint name."""

from collections.abc import Callable

from torch import Tensor

from edgekit.quantize.tensor import Weight

ReadWeight = Callable[[str], Weight]


def floats(weight: Weight) -> Tensor:
    """Return the weight as float32."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()


def row_block(weight: Weight, part: int, parts: int) -> Weight:
    """Return the `part`-th of `parts` equal blocks of a matrix's rows, without copying codes."""
    if parts == 1:
        return weight
    rows = weight.shape[0] // parts
    block = slice(part * rows, (part + 1) * rows)
    return weight[block] if isinstance(weight, Tensor) else weight.rows(block)
