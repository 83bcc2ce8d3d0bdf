"""Schemes: what a weight is stored as, by a short name such as `w8` or `w4g32`."""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize import super_blocks
from edgekit.quantize.affine import quantize
from edgekit.quantize.codebook.fit import IQ4_NL, fit_codebook
from edgekit.quantize.grid import Grid
from edgekit.quantize.ranges import RangeMethod
from edgekit.quantize.tensor import QuantizedTensor, scales_shape, stored_bytes

FORMS = (
    "float, w8, w4, w8gN, w4gN, w4gNa (N weights share a scale, a multiple of 32, at "
    "8 bits also 16; a: and a zero point), w6g16, w5g32, cb4, cb3, cb2 with gN and xN (N "
    "codebooks, one for each group of rows), cb4nl"
)
STATIC = re.compile(r"w([48])a8(-tensor)?(-affine)?")
"""Names of schemes whose activations have static ranges: `edgekit.quantize.traced.schemes`."""
_NAME = re.compile(r"w([48])(?:g([1-9][0-9]{0,5})(a?))?")
_ONLY_GROUPS = {5: 32, 6: super_blocks.GROUP}
_CODEBOOK = re.compile(r"cb([234])(?:g([1-9][0-9]{0,5}))?(?:x([1-9][0-9]{0,3}))?")


@dataclass(frozen=True)
class Scheme:
    """How one weight [rows, columns] is stored.

    bits         2, 3, 4, 5, 6 or 8, or None for a float that is left as it is
    granularity  "channel": one scale per row; "group": one per run of `group_size` columns
    group_size   32, 64, 128, ...: what ExecuTorch and GGUF can hold; None unless "group". At 5 bits
                 32 (ggml's Q5_0), at 6 bits 16 with scales of two levels
                 (`edgekit.quantize.super_blocks`; Q6_K), and 16 at 8 bits holds those
    symmetric    False: codes 0 to 15 and a zero point for each group, for 4-bit groups alone,
                 which GGUF (Q4_1) and ONNX hold; XNNPACK's kernels take none for weights
    books        learned codebooks of int8 entries, each for an equal run of rows, whose indices
                 the codes are (2, 3 or 4 bits); 0 where codes are numbers
    table        "cb4nl": one codebook, and not a learned one but ggml's table for IQ4_NL
    """

    bits: Literal[2, 3, 4, 5, 6, 8] | None
    granularity: Literal["channel", "group"] | None
    group_size: int | None = None
    symmetric: bool = True
    books: int = 0
    table: Literal["cb4nl"] | None = None

    def __post_init__(self) -> None:
        """Refuse contradictory fields."""
        allowed = (2, 3, 4) if self.books else (None, 4, 5, 6, 8)
        if self.bits not in allowed:
            raise ValueError(f"bits must be one of {allowed}, got {self.bits}")
        if self.table is not None and (self.bits, self.books, self.group_size) != (4, 1, 32):
            raise ValueError(f"the table of {self.table} is for 4-bit groups of 32")
        if (self.bits is None) != (self.granularity is None):
            raise ValueError(f"bits {self.bits} contradict granularity {self.granularity!r}")
        if (self.group_size is not None) != (self.granularity == "group"):
            raise ValueError(
                f"group_size {self.group_size} contradicts granularity {self.granularity!r}"
            )
        self._check_group_size()
        if not self.symmetric and (self.bits, self.granularity, self.books) != (4, "group", 0):
            raise ValueError("only 4-bit groups can be asymmetric")

    def _check_group_size(self) -> None:
        size = self.group_size
        only = _ONLY_GROUPS.get(self.bits or 0)
        if only is not None and (size, self.books) != (only, 0):
            raise ValueError(f"of {self.bits} bits there is w{self.bits}g{only} alone")
        of_sixteen = size == super_blocks.GROUP and self.bits in (6, 8) and not self.books
        if size is not None and not of_sixteen and (size < 32 or size % 32):
            raise ValueError(f"group_size must be a multiple of 32, got {size}")

    @classmethod
    def parse(cls, name: str) -> "Scheme":
        """Return the scheme of a name; EdgekitError with the allowed forms for any other."""
        if name == "float":
            return FLOAT
        if name == "cb4nl":
            return cls(4, "group", 32, books=1, table="cb4nl")
        if name == "w5g32":
            return cls(5, "group", 32)
        if name == "w6g16":
            return cls(6, "group", super_blocks.GROUP)
        if STATIC.fullmatch(name):
            raise EdgekitError(
                f"scheme {name} has static ranges of activations and is for modules: a language "
                "model's are found at run time, so give it w8 or w4g32"
            )
        match, codebook = _NAME.fullmatch(name), _CODEBOOK.fullmatch(name)
        try:
            if codebook is not None:
                return _codebook_scheme(codebook)
            if match is None:
                raise EdgekitError(f"unknown scheme {name!r}: allowed are {FORMS}")
            bits: Literal[4, 8] = 4 if match[1] == "4" else 8
            if match[2] is None:
                return cls(bits, "channel")
            return cls(bits, "group", int(match[2]), symmetric=not match[3])
        except ValueError as error:
            raise EdgekitError(f"unknown scheme {name!r}: {error}; allowed are {FORMS}") from error

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if self.bits is None:
            return "float"
        if self.table is not None:
            return self.table
        group = "" if self.group_size is None else f"g{self.group_size}"
        if self.books:
            return f"cb{self.bits}{group}" + (f"x{self.books}" if self.books > 1 else "")
        return f"w{self.bits}{group}" + ("" if self.symmetric else "a")

    @property
    def is_float(self) -> bool:
        """True where nothing is quantized."""
        return self.bits is None

    @property
    def two_levels(self) -> bool:
        """Whether scales are of two levels (`edgekit.quantize.super_blocks`)."""
        return self.bits == super_blocks.BITS

    @property
    def as_int8(self) -> "Scheme":
        """What holds weights of codebooks, or of 5 and 6 bits: int8 codes and the same scales."""
        between = self.bits in _ONLY_GROUPS
        return Scheme(8, self.granularity, self.group_size) if self.books or between else self

    @property
    def default_range(self) -> RangeMethod | None:
        """The range method used when a recipe names none; None for codebooks, which have none.

        Least squares gains several per cent of error at 4 bits, less at 5 and 6, and next to
        nothing at 8.
        """
        if self.books:
            return None
        return "minmax" if self.bits in (None, 8) else "mse"

    @property
    def grid(self) -> Grid:
        """The codes of the scheme: [-127, 127] at 8 bits, [-8, 7] or [0, 15] at 4 bits.

        [-16, 15] at 5 bits, [-32, 31] at 6. XNNPACK, GGUF and ONNX all take -8; at 8 bits the code
        -128 gains nothing and the whitepaper's restricted range (section 2.2) keeps products in 16
        bits.
        """
        if self.bits is None:
            raise ValueError("the float scheme has no codes")
        if self.books:
            raise ValueError(f"the codes of {self.name} are indices, on no grid")
        return Grid(self.bits, symmetric=self.symmetric, restricted=self.bits == 8)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where a weight of this shape cannot be stored like this."""
        if not self.is_float:
            scales_shape(shape, self.axis, self.group_size)
        if self.two_levels:
            super_blocks.check_columns(shape[-1])
        if self.books and shape[0] % self.books:
            raise ValueError(f"{self.books} codebooks do not divide {shape[0]} rows")

    def quantize(self, weight: Tensor, range_method: RangeMethod | None = None) -> QuantizedTensor:
        """Quantize a float weight (channels are axis 0, groups run along the last axis).

        Raises ValueError for the float scheme, a shape that cannot be grouped, infinities, NaN.
        """
        if self.books:
            return self.fit_codebook(weight)
        return quantize(
            weight,
            self.grid,
            axis=self.axis,
            group_size=self.group_size,
            method=range_method or self.default_range or "minmax",
        )

    def fit_codebook(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
        """Fit codebooks to a float weight by k-means (`edgekit.quantize.codebook.fit`).

        `importance`, `[columns]` or the weight's shape, weighs squared errors. Raises ValueError
        as `quantize` does, and for a scheme without codebooks.
        """
        if self.bits is None or not self.books:
            raise ValueError(f"the scheme {self.name} has no codebooks")
        return fit_codebook(
            weight,
            self.bits,
            self.books,
            group_size=self.group_size,
            importance=importance,
            table=None if self.table is None else IQ4_NL,
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the exact bytes of a weight of this shape: packed codes and scales.

        A channel's scale counts 4 bytes (float32), a group's 2 (bfloat16; at 6 bits 1, and 2 for
        each 16), a zero point 1, an entry of a codebook 1 and a float element 4 (float32, what the
        engines compute in). Equals `QuantizedTensor.nbytes`.
        """
        if self.bits is None or self.granularity is None:
            return 4 * torch.Size(shape).numel()
        count = torch.Size(scales_shape(shape, self.axis, self.group_size)).numel()
        zero_points = 0 if self.symmetric else count
        entries = self.books << self.bits
        return stored_bytes(shape, self.bits, self.granularity, count) + zero_points + entries

    @property
    def axis(self) -> int | None:
        """The axis that has a scale per entry; None unless per channel."""
        return 0 if self.granularity == "channel" else None


def _codebook_scheme(match: re.Match[str]) -> Scheme:
    bits: Literal[2, 3, 4] = {"2": 2, "3": 3, "4": 4}[match[1]]  # type: ignore[assignment]
    books = int(match[3] or 1)
    if match[3] == "1":
        raise ValueError("x1 is said by leaving it out")
    if match[2] is None:
        return Scheme(bits, "channel", books=books)
    return Scheme(bits, "group", int(match[2]), books=books)


FLOAT = Scheme(bits=None, granularity=None)
"""The scheme of tensors that stay as they are."""


def scheme_of(
    bits: int,
    axis: int | None,
    group_size: int | None,
    *,
    zero_points: bool,
    signed: bool,
    codebook: Tensor | None = None,
) -> Scheme:
    """Return the scheme of codes that were made elsewhere; ValueError where there is none.

    The fields are those of `QuantizedTensor`.
    """
    if codebook is not None:
        return _scheme_of_codebook(bits, axis, group_size, codebook)
    if bits not in (4, 5, 6, 8):
        raise ValueError(f"codes of {bits} bits")
    if axis not in (0, None) or (axis is None and group_size is None):
        raise ValueError("scales that are neither per row nor per group")
    if signed == zero_points:
        raise ValueError("signed codes with zero points" if signed else "indices of a codebook")
    granularity: Literal["channel", "group"] = "channel" if group_size is None else "group"
    return Scheme(
        bits,  # type: ignore[arg-type]  # one of the four
        granularity,
        group_size,
        symmetric=not zero_points,
    )


def _scheme_of_codebook(
    bits: int, axis: int | None, group_size: int | None, codebook: Tensor
) -> Scheme:
    if bits not in (2, 3, 4):
        raise ValueError(f"codebooks of {bits} bits")
    if (axis, group_size) == (None, None) or axis not in (0, None):
        raise ValueError("scales that are neither per row nor per group")
    books = len(codebook) if codebook.ndim == 2 else 1
    is_table = group_size == 32 and codebook.ndim == 1 and codebook.tolist() == list(IQ4_NL)
    return Scheme(
        bits,  # type: ignore[arg-type]  # one of the three
        "channel" if group_size is None else "group",
        group_size,
        books=books,
        table="cb4nl" if is_table else None,
    )
