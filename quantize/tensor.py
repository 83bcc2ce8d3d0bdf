"""`QuantizedTensor`: the integer codes that every quantizer produces and every exporter packs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.schemes import super_blocks as sizes
from edgekit.quantize.schemes.sizes import (
    PACKABLE_BITS,
    Granularity,
    code_range,
    scales_shape,
    stored_bytes,
)

CHUNK_ELEMENTS = 1 << 17
"""Elements handled at once: 512 KiB of float32, so that working copies stay in the cache."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes of one weight and what turns them back into numbers.

    codes       int8 (signed) or uint8, in the weight's shape, one code per element (unpacked)
    scales      float32, positive: [] per tensor, [channels] per channel, and
                [..., columns / group_size] per group (the weight's shape but for the last axis)
    zero_points int32 shaped like scales and inside the codes' range; None where they are all zero
    bits        2, 3, 4, 5, 6 or 8; codes of 6 have groups of 16 with scales of two levels
                (`edgekit.quantize.super_blocks`)
    group_size  elements of the last axis that share a scale; None unless per group
    axis        the channel axis; None unless per channel
    codebook    float32 [2**bits], or [books, 2**bits] where each of `books` equal runs of rows
                has its own; codes (uint8) are then indices into it and zero_points is None

    Tensors are kept, not copied; whoever holds one must not write into it. Raises ValueError for
    a field that contradicts another.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    bits: int = 8
    group_size: int | None = None
    axis: int | None = None
    codebook: Tensor | None = None

    def __post_init__(self) -> None:
        """Check every field against the others."""
        if self.bits not in PACKABLE_BITS:
            raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {self.bits}")
        self._check_codes()
        self._check_scales()
        if self.zero_points is not None:
            self._check_zero_points(self.zero_points)
        if self.codebook is not None:
            self._check_codebook(self.codebook)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return tuple(self.codes.shape)

    @property
    def signed(self) -> bool:
        """True where codes are int8."""
        return self.codes.dtype == torch.int8

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and highest code that `bits` can hold."""
        return code_range(self.bits, self.signed)

    @property
    def granularity(self) -> Granularity:
        """What one scale is for."""
        if self.group_size is not None:
            return "group"
        return "tensor" if self.axis is None else "channel"

    @property
    def two_levels(self) -> bool:
        """Whether scales are of two levels (`edgekit.quantize.super_blocks`)."""
        return self.bits == sizes.BITS

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, scales, zero points and codebook.

        A scale of a group counts 2 bytes (bfloat16) and any other 4 (float32), one of two levels 1
        and its step 2, a zero point 1, a codebook entry 1 where all are int8 numbers, else 4: what
        `save_quantized` writes.
        """
        total = stored_bytes(self.shape, self.bits, self.granularity, self.scales.numel())
        if self.zero_points is not None:
            total += self.zero_points.numel()
        if self.codebook is not None:
            total += (1 if self.codebook_is_int8 else 4) * self.codebook.numel()
        return total

    @property
    def codebook_is_int8(self) -> bool:
        """True where there is a codebook whose entries are all integers from -127 to 127."""
        book = self.codebook
        return book is not None and bool(((book == book.round()) & (book.abs() <= 127)).all())

    def rows(self, index: slice | Tensor) -> "QuantizedTensor":
        """Return some rows of a matrix, codes not copied for a slice; those of many, in any order.

        Where each run of rows has its own codebook, each row of the result has one.
        """
        scales, zeros, books = self.scales, self.zero_points, self.codebook
        if self.axis == 0 or self.group_size is not None:
            scales, zeros = scales[index], None if zeros is None else zeros[index]
        if books is not None and books.ndim == 2:
            books = books.repeat_interleave(self.shape[0] // len(books), 0)[index]
        codes = self.codes[index]
        return replace(self, codes=codes, scales=scales, zero_points=zeros, codebook=books)

    def as_int8(self) -> "QuantizedTensor":
        """Return the same weight as int8 codes of 8 bits: indices are looked up, scales are kept.

        So are codes of 5 and 6 bits; others without a codebook are returned as they are. ValueError
        where the codebook's entries are not integers of 8 bits.
        """
        if self.codebook is None:
            return replace(self, bits=8) if self.bits in (5, 6) else self
        if not self.codebook_is_int8:
            raise ValueError("its codebook's entries are no int8 numbers")
        books = as_rows(self.codebook).to(torch.int8)
        codes = torch.empty_like(self.codes, dtype=torch.int8)
        runs = (each.chunk(len(books)) for each in (self.codes, codes))
        for book, part, target in zip(books, *runs, strict=True):
            target.copy_(book[part.long()])
        return replace(self, codes=codes, bits=8, codebook=None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return (codes - zero_points) * scales in the weight's shape, rounded once to float32.

        Codes of 8 bits times bfloat16-valued scales have 16 significant bits, so float32 is
        exact and another `dtype` is a single rounding. With a codebook: codebook[codes] * scales.
        """
        result = torch.empty(self.codes.shape, dtype=dtype)
        rows = as_rows(result)
        for part, values in self.decoded():
            rows[part] = values
        return result

    def decoded(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield what `dequantize` returns in cache-sized runs of rows, as float32.

        Slices are of the first axis of `as_rows` of the weight.
        """
        codes = as_rows(self.codes)
        scales, zeros = self._spread(self.scales), None
        if self.zero_points is not None:
            zeros = self._spread(self.zero_points)
        step = max(1, CHUNK_ELEMENTS * len(codes) // codes.numel())
        for start in range(0, len(codes), step):
            part = slice(start, min(start + step, len(codes)))
            values = self._look_up(codes[part], part).contiguous()
            blocks = values if self.group_size is None else _groups(values, self.group_size)
            if zeros is not None:
                # Both are small integers: their difference is exact in float32.
                blocks -= zeros[part] if len(zeros) > 1 else zeros
            blocks *= scales[part] if len(scales) > 1 else scales
            yield part, values

    def _look_up(self, codes: Tensor, rows: slice) -> Tensor:
        """Return the numbers that the codes of some rows stand for before scaling, as float32."""
        if self.codebook is None:
            return codes.to(torch.float32)
        books = as_rows(self.codebook)
        run = len(self.codes) // len(books) if self.codebook.ndim == 2 else rows.stop
        offsets = torch.arange(rows.start, rows.stop) // run * books.shape[1]
        return books.flatten()[codes.long() + offsets.view(-1, *[1] * (codes.ndim - 1))]

    def _spread(self, values: Tensor) -> Tensor:
        """Reshape scales or zero points so that they broadcast over the blocks of the rows."""
        if self.group_size is not None:
            return as_rows(values).unsqueeze(-1)
        dims = max(2, self.codes.ndim)
        axis = None if self.axis is None else self.axis + dims - self.codes.ndim
        return values.view(*(-1 if i == axis else 1 for i in range(dims)))

    def _check_codes(self) -> None:
        if self.codes.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"codes must be int8 or uint8, got {self.codes.dtype}")
        if self.codes.numel() == 0:
            raise ValueError(f"codes must not be empty, got shape {self.shape}")
        if self.bits == 8:
            return
        low, high = self.code_range
        least, most = (int(value) for value in torch.aminmax(self.codes))
        if least < low or most > high:
            raise ValueError(
                f"codes of {self.bits} bits must lie in [{low}, {high}], got [{least}, {most}]"
            )

    def _check_scales(self) -> None:
        expected = scales_shape(self.shape, self.axis, self.group_size)
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != expected:
            raise ValueError(
                f"scales must be float32 of shape {expected}, "
                f"got {self.scales.dtype} of shape {tuple(self.scales.shape)}"
            )
        least, most = (float(value) for value in torch.aminmax(self.scales))
        if not (least > 0 and most < float("inf")):  # also false for NaN
            raise ValueError(f"scales must be positive and finite, got [{least}, {most}]")
        if self.two_levels:
            if self.group_size != sizes.GROUP or not self.signed:
                raise ValueError(f"6-bit codes are int8 in groups of {sizes.GROUP}")
            sizes.check_columns(self.shape[-1])
            super_blocks.split(self.scales)

    def _check_zero_points(self, zero_points: Tensor) -> None:
        if self.codebook is not None:
            raise ValueError("a codebook has no zero_points: give one of the two")
        if zero_points.dtype != torch.int32 or zero_points.shape != self.scales.shape:
            raise ValueError(
                f"zero_points must be int32 of shape {tuple(self.scales.shape)}, "
                f"got {zero_points.dtype} of shape {tuple(zero_points.shape)}"
            )
        low, high = self.code_range
        least, most = (int(value) for value in torch.aminmax(zero_points))
        if least < low or most > high:
            raise ValueError(f"zero_points must lie in [{low}, {high}], got [{least}, {most}]")

    def _check_codebook(self, codebook: Tensor) -> None:
        if self.signed:
            raise ValueError("codes of a codebook are indices and must be uint8, got int8")
        if codebook.dtype != torch.float32 or not bool(torch.isfinite(codebook).all()):
            raise ValueError(f"codebook must be finite float32, got {codebook.dtype}")
        books = codebook.shape[0] if codebook.ndim == 2 else 1
        if codebook.ndim not in (1, 2) or codebook.shape[-1] != 1 << self.bits or books == 0:
            raise ValueError(
                f"codebook must be [{1 << self.bits}] or [books, {1 << self.bits}], "
                f"got {list(codebook.shape)}"
            )
        if codebook.ndim == 2 and (self.codes.ndim == 0 or self.shape[0] % books):
            raise ValueError(f"{books} codebooks must divide the rows of shape {self.shape}")


Weight = QuantizedTensor | Tensor
"""A weight as codes or as floats."""


def as_rows(values: Tensor) -> Tensor:
    """View a scalar or a vector as a matrix of one row; return anything else as it is."""
    return values if values.ndim > 1 else values.reshape(1, -1)


def _groups(values: Tensor, group_size: int) -> Tensor:
    """View contiguous values [..., columns] as [..., groups, group_size]."""
    return values.view(*values.shape[:-1], -1, group_size)
