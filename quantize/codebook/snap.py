"""Codebooks on an int8 grid: every entry an integer of [-127, 127], times the row's scale.

A weight is then `codebook[index] * scale` with a product of an int8 number and a scale per channel
or group, which is what the 8-bit kernels of every engine multiply by. What it costs is small: an
entry moves by at most 1/254 of the largest.
"""

import torch
from torch import Tensor

from edgekit.quantize.scales import SMALLEST_SCALE

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
