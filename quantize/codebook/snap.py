"""Codebooks on an int8 grid: every entry an integer of [-127, 127], times the row's scale.

A weight is then `codebook[index] * scale` with a product of an int8 number and a scale per channel
or group, which is what the 8-bit kernels of every engine multiply by. What it costs is small: an
entry moves by at most 1/254 of the largest.
"""

from dataclasses import replace

import torch
from torch import Tensor

from edgekit.quantize.scales import SMALLEST_SCALE
from edgekit.quantize.tensor import QuantizedTensor, as_rows

LARGEST = 127


def snap(books: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return integer entries `[books, levels]` (float32) and what to multiply scales by `[books]`.

    The largest entry of each book becomes 127 or -127, unless the mean of the book's scales
    `[books, units]` would then be less than what can be stored. A book of zeros keeps them.
    """
    factors = books.abs().amax(-1) / LARGEST
    factors = torch.where(factors > 0, factors, 1.0)
    factors = torch.maximum(factors, SMALLEST_SCALE / scales.mean(-1))
    return (books / factors[:, None]).round_().clamp_(-LARGEST, LARGEST), factors


def as_int8(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight as int8 codes of 8 bits: indices are looked up, scales are kept.

    So are codes of 5 and 6 bits; others without a codebook are returned as they are. ValueError
    where the codebook's entries are not integers of 8 bits.
    """
    if tensor.codebook is None:
        return replace(tensor, bits=8) if tensor.bits in (5, 6) else tensor
    if not tensor.codebook_is_int8:
        raise ValueError("its codebook's entries are no int8 numbers")
    books = as_rows(tensor.codebook).to(torch.int8)
    codes = torch.empty_like(tensor.codes, dtype=torch.int8)
    for book, part, target in zip(
        books,
        tensor.codes.chunk(len(books)),
        codes.chunk(len(books)),
        strict=True,
    ):
        target.copy_(book[part.long()])
    return replace(tensor, codes=codes, bits=8, codebook=None)
