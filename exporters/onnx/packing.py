"""How ONNX Runtime's MatMulNBits and GatherBlockQuantized hold codes, and back.

Layouts: docs/ContribOperators.md of onnxruntime. A row is cut into blocks of `block_size` codes
that share a scale; a code is stored as an unsigned number and stands for
`(number - zero_point) * scale`, where the zero point is `2**(bits - 1)` unless others are given.
At 4 bits two numbers share a byte, the first in the low half.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgekit.exporters.onnx.layout import block_size
from edgekit.quantize.packing import pack, unpack
from edgekit.quantize.tensor import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix `[rows, columns]`.

    numbers      uint8 `[rows, columns * bits / 8]`
    scales       float32 `[rows, blocks]`
    zero_points  uint8 `[rows, ceil(blocks * bits / 8)]`, None where all are `2**(bits - 1)`
    """

    bits: int
    block_size: int
    numbers: Tensor
    scales: Tensor
    zero_points: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows, width = self.numbers.shape
        return rows, width * 8 // self.bits

    @property
    def layout(self) -> tuple[int, int, bool]:
        """What must be equal for rows to stand in one matrix."""
        return self.bits, self.block_size, self.zero_points is not None


def pack_matrix(weight: QuantizedTensor) -> Packed:
    """Pack codes and scales verbatim; `weight` has two axes and a scale per channel or group."""
    low, bits = weight.code_range[0], weight.bits
    rows, columns = weight.shape
    block = block_size(columns, weight.group_size)
    repeats = columns // block * rows // weight.scales.numel()
    zeros = weight.zero_points
    if zeros is None and low != -(1 << (bits - 1)):
        zeros = torch.zeros_like(weight.scales, dtype=torch.int32)
    points = None
    if zeros is not None:
        spread = _spread(zeros - low, rows, repeats).to(torch.uint8)
        points = pack(spread, bits)
    return Packed(
        bits,
        block,
        pack(_unsigned(weight.codes, low), bits),
        _spread(weight.scales, rows, repeats),
        points,
    )


def unpack_matrix(packed: Packed) -> QuantizedTensor:
    """Undo `pack_matrix`; every block has its own scale then."""
    columns, blocks = packed.shape[1], packed.scales.shape[1]
    numbers = unpack(packed.numbers, packed.bits, columns, signed=False)
    middle = 1 << (packed.bits - 1)
    points = None
    if packed.zero_points is not None:
        points = unpack(packed.zero_points, packed.bits, blocks, signed=False).to(torch.int32)
        return QuantizedTensor(
            numbers, packed.scales, points, bits=packed.bits, group_size=packed.block_size
        )
    return QuantizedTensor(
        _signed(numbers, middle), packed.scales, bits=packed.bits, group_size=packed.block_size
    )


def stack(parts: Sequence[Packed]) -> Packed:
    """Put the rows of matrices of one layout below each other."""
    if len(parts) == 1:
        return parts[0]
    points = [part.zero_points for part in parts if part.zero_points is not None]
    return replace(
        parts[0],
        numbers=torch.cat([part.numbers for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=torch.cat(points) if points else None,
    )


def _spread(values: Tensor, rows: int, repeats: int) -> Tensor:
    return values.reshape(rows, -1).repeat_interleave(repeats, dim=1)


def _unsigned(codes: Tensor, low: int) -> Tensor:
    """Return `codes - low` as uint8."""
    return (
        codes if codes.dtype == torch.uint8 and low == 0 else codes.view(torch.uint8) - (low & 255)
    )


def _signed(numbers: Tensor, middle: int) -> Tensor:
    """Return `numbers - middle` as int8."""
    return (numbers - middle).view(torch.int8)
