"""Schemes whose codes are numbers: a weight is scale * (code - zero point)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.schemes import super_blocks
from edgekit.quantize.schemes.sizes import scales_shape, stored_bytes

_ONLY_GROUPS = {5: 32, 6: super_blocks.GROUP}


@dataclass(frozen=True)
class Affine:
    """Codes of a weight [rows, columns] with a scale for each row or for each group of columns.

    bits        4, 5, 6 or 8
    group_size  columns that share a scale: 32, 64, 128, ..., what ExecuTorch and GGUF can hold;
                None for a scale per row. At 5 bits 32 (ggml's Q5_0), at 6 bits 16 with scales of
                two levels (Q6_K); 8 bits take 16, too, to hold those
    symmetric   False: codes 0 to 15 and a zero point for each group, for 4-bit groups alone, which
                GGUF (Q4_1) and ONNX hold; XNNPACK's kernels take none for weights
    """

    bits: Literal[4, 5, 6, 8]
    group_size: int | None = None
    symmetric: bool = True

    is_float: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what no target holds."""
        if self.bits not in (4, 5, 6, 8):
            raise ValueError(f"bits must be 4, 5, 6 or 8, got {self.bits}")
        only = _ONLY_GROUPS.get(self.bits)
        if only is not None and self.group_size != only:
            raise ValueError(f"of {self.bits} bits there is w{self.bits}g{only} alone")
        of_sixteen = self.group_size == super_blocks.GROUP and self.bits in (6, 8)
        if not of_sixteen:
            check_group_size(self.group_size)
        if not self.symmetric and (self.bits != 4 or self.group_size is None):
            raise ValueError("only 4-bit groups can be asymmetric")

    @property
    def name(self) -> str:
        """The name that `parse_scheme` reads."""
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}{group}{'' if self.symmetric else 'a'}"

    @property
    def granularity(self) -> Literal["channel", "group"]:
        """Whether a scale is for a row or for a group of its columns."""
        return "channel" if self.group_size is None else "group"

    @property
    def axis(self) -> int | None:
        """The axis that has a scale per entry; None unless per channel."""
        return 0 if self.group_size is None else None

    @property
    def two_levels(self) -> bool:
        """Whether scales are of two levels (`super_blocks`)."""
        return self.bits == super_blocks.BITS

    @property
    def as_int8(self) -> "Affine":
        """What holds codes of 5 and 6 bits elsewhere: int8 codes and the same scales."""
        return Affine(8, self.group_size) if self.bits in _ONLY_GROUPS else self

    @property
    def default_range(self) -> RangeMethod:
        """The range method used when a recipe names none.

        Least squares gains several per cent of error at 4 bits, less at 5 and 6, and next to
        nothing at 8.
        """
        return "minmax" if self.bits == 8 else "mse"

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a weight of this shape cannot be stored like this."""
        scales_shape(shape, self.axis, self.group_size)
        if self.two_levels:
            super_blocks.check_columns(shape[-1])

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a weight of this shape: packed codes, scales, zero points.

        A channel's scale counts 4 bytes (float32), a group's 2 (bfloat16; at 6 bits 1, and 2 for
        each 16), a zero point 1. Equals `QuantizedTensor.nbytes`.
        """
        count = math.prod(scales_shape(shape, self.axis, self.group_size))
        stored = stored_bytes(shape, self.bits, self.granularity, count)
        return stored + (0 if self.symmetric else count)


def check_group_size(size: int | None) -> None:
    """Raise ValueError unless it is None or what every target's blocks are made of."""
    if size is not None and (size < 32 or size % 32):
        raise ValueError(f"group_size must be a multiple of 32, got {size}")
