"""Schemes: what a weight is stored as, by a short name such as `w8` or `w4g32`."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.affine import quantize
from edgekit.quantize.grid import Grid
from edgekit.quantize.ranges import RangeMethod
from edgekit.quantize.tensor import QuantizedTensor, scales_shape, stored_bytes

FORMS = "float, w8, w4, w8gN, w4gN, w4gNa (N weights share a scale, a multiple of 32; a: and a zero point)"
_NAME = re.compile(r"w([48])(?:g([1-9][0-9]{0,5})(a?))?")


@dataclass(frozen=True)
class Scheme:
    """How one weight [rows, columns] is stored.

    bits         4 or 8, or None for a float that is left as it is
    granularity  "channel": one scale per row; "group": one per run of `group_size` columns
    group_size   32, 64, 128, ...: what ExecuTorch and GGUF can hold; None unless "group"
    symmetric    False: codes 0 to 15 and a zero point for each group, for 4-bit groups alone,
                 which GGUF (Q4_1) and ONNX hold; XNNPACK's kernels take none for weights
    """

    bits: Literal[4, 8] | None
    granularity: Literal["channel", "group"] | None
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse contradictory fields."""
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits must be 4, 8 or None, got {self.bits}")
        if (self.bits is None) != (self.granularity is None):
            raise ValueError(f"bits {self.bits} contradict granularity {self.granularity!r}")
        if (self.group_size is not None) != (self.granularity == "group"):
            raise ValueError(
                f"group_size {self.group_size} contradicts granularity {self.granularity!r}"
            )
        size = self.group_size
        if size is not None and (size < 32 or size % 32):
            raise ValueError(f"group_size must be a multiple of 32, got {size}")
        if not self.symmetric and (self.bits, self.granularity) != (4, "group"):
            raise ValueError("only 4-bit groups can be asymmetric")

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Return the scheme of a name; EdgekitError with the allowed forms for any other."""
        if name == "float":
            return FLOAT
        match = _NAME.fullmatch(name)
        if match is None:
            raise EdgekitError(f"unknown scheme {name!r}: allowed are {FORMS}")
        bits: Literal[4, 8] = 4 if match[1] == "4" else 8
        if match[2] is None:
            return cls(bits, "channel")
        try:
            return cls(bits, "group", int(match[2]), symmetric=not match[3])
        except ValueError as error:
            raise EdgekitError(f"unknown scheme {name!r}: {error}; allowed are {FORMS}") from error

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if self.bits is None:
            return "float"
        if self.group_size is None:
            return f"w{self.bits}"
        return f"w{self.bits}g{self.group_size}" + ("" if self.symmetric else "a")

    @property
    def is_float(self) -> bool:
        """True where nothing is quantized."""
        return self.bits is None

    @property
    def default_range(self) -> RangeMethod:
        """The range method used when a recipe names none.

        Least squares gains several per cent of error at 4 bits and next to nothing at 8.
        """
        return "mse" if self.bits == 4 else "minmax"

    @property
    def grid(self) -> Grid:
        """The codes of the scheme: [-127, 127] at 8 bits, [-8, 7] or [0, 15] at 4 bits.

        XNNPACK, GGUF and ONNX all take -8; at 8 bits the code -128 gains nothing and the
        whitepaper's restricted range (section 2.2) keeps products in 16 bits.
        """
        if self.bits is None:
            raise ValueError("the float scheme has no codes")
        return Grid(self.bits, symmetric=self.symmetric, restricted=self.bits == 8)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a weight of this shape cannot be stored like this."""
        if not self.is_float:
            scales_shape(shape, self.axis, self.group_size)

    def quantize(self, weight: Tensor, range_method: RangeMethod | None = None) -> QuantizedTensor:
        """Quantize a float weight (channels are axis 0, groups run along the last axis).

        Raises ValueError for the float scheme, a shape that cannot be grouped, infinities, NaN.
        """
        return quantize(
            weight,
            self.grid,
            axis=self.axis,
            group_size=self.group_size,
            method=range_method or self.default_range,
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a weight of this shape: packed codes and scales.

        A channel's scale counts 4 bytes (float32), a group's 2 (bfloat16), a zero point 1 and a
        float element 4 (float32, what the engines compute in). Equals `QuantizedTensor.nbytes`.
        """
        if self.bits is None or self.granularity is None:
            return 4 * torch.Size(shape).numel()
        count = torch.Size(scales_shape(shape, self.axis, self.group_size)).numel()
        zero_points = 0 if self.symmetric else count
        return stored_bytes(shape, self.bits, self.granularity, count) + zero_points

    @property
    def axis(self) -> int | None:
        """The axis that has a scale per entry; None unless per channel."""
        return 0 if self.granularity == "channel" else None


FLOAT = Scheme(bits=None, granularity=None)
"""The scheme of tensors that stay as they are."""


def scheme_of(
    bits: int, axis: int | None, group_size: int | None, *, zero_points: bool, signed: bool
) -> Scheme:
    """Return the scheme of codes that were made elsewhere; ValueError where there is none.

    The fields are those of `QuantizedTensor`, for a tensor without a codebook.
    """
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits")
    if axis not in (0, None) or (axis is None and group_size is None):
        raise ValueError("scales that are neither per row nor per group")
    if signed == zero_points:
        raise ValueError("signed codes with zero points" if signed else "indices of a codebook")
    granularity: Literal["channel", "group"] = "channel" if group_size is None else "group"
    return Scheme(4 if bits == 4 else 8, granularity, group_size, symmetric=not zero_points)
