"""Schemes whose codes are indices into learned codebooks."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgekit.quantize.schemes.affine import Affine, check_group_size
from edgekit.quantize.schemes.sizes import scales_shape, stored_bytes

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The table of ggml's IQ4_NL (`kvalues_iq4nl` in ggml/src/ggml-common.h)."""


@dataclass(frozen=True)
class Codebook:
    """Indices of a weight [rows, columns] into entries of int8, which a scale multiplies.

    bits        2, 3 or 4
    books       codebooks, each for an equal run of rows
    group_size  columns that share a scale, a multiple of 32; None for a scale per row
    is_table    "cb4nl": one codebook, and not a learned one but ggml's table for IQ4_NL
    """

    bits: Literal[2, 3, 4]
    books: int = 1
    group_size: int | None = None
    is_table: bool = False

    is_float: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    two_levels: ClassVar[bool] = False
    default_range: ClassVar[None] = None

    def __post_init__(self) -> None:
        """Refuse what no file holds."""
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits must be 2, 3 or 4, got {self.bits}")
        if self.books < 1:
            raise ValueError(f"books must be 1 or more, got {self.books}")
        if self.is_table and (self.bits, self.books, self.group_size) != (4, 1, 32):
            raise ValueError("the table of cb4nl is for 4-bit groups of 32")
        check_group_size(self.group_size)

    @property
    def name(self) -> str:
        """The name that `parse_scheme` reads."""
        if self.is_table:
            return "cb4nl"
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"cb{self.bits}{group}" + (f"x{self.books}" if self.books > 1 else "")

    @property
    def granularity(self) -> Literal["channel", "group"]:
        """Whether a scale is for a row or for a group of its columns."""
        return "channel" if self.group_size is None else "group"

    @property
    def axis(self) -> int | None:
        """The axis that has a scale per entry; None unless per channel."""
        return 0 if self.group_size is None else None

    @property
    def as_int8(self) -> Affine:
        """What holds the weights where there are no codebooks: entries as int8, the same scales."""
        return Affine(8, self.group_size)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a weight of this shape cannot be stored like this."""
        scales_shape(shape, self.axis, self.group_size)
        if shape[0] % self.books:
            raise ValueError(f"{self.books} codebooks do not divide {shape[0]} rows")

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a weight of this shape: packed indices, scales, entries.

        A channel's scale counts 4 bytes (float32), a group's 2 (bfloat16), an entry 1. Equals
        `QuantizedTensor.nbytes`.
        """
        count = math.prod(scales_shape(shape, self.axis, self.group_size))
        stored = stored_bytes(shape, self.bits, self.granularity, count)
        return stored + (self.books << self.bits)
