"""Which scheme codes follow that were made elsewhere."""

from typing import TYPE_CHECKING, Literal, cast

from edgekit.quantize.schemes.affine import Affine
from edgekit.quantize.schemes.codebook import IQ4_NL, Codebook

if TYPE_CHECKING:
    from torch import Tensor


def scheme_of(
    bits: int,
    axis: int | None,
    group_size: int | None,
    *,
    zero_points: bool,
    signed: bool,
    codebook: "Tensor | None" = None,
) -> Affine | Codebook:
    """Return the scheme of codes that were made elsewhere; ValueError where there is none.

    The fields are those of `QuantizedTensor`.
    """
    if codebook is None and bits not in (4, 5, 6, 8):
        raise ValueError(f"codes of {bits} bits")
    if codebook is not None and bits not in (2, 3, 4):
        raise ValueError(f"codebooks of {bits} bits")
    if axis not in (0, None) or (axis is None and group_size is None):
        raise ValueError("scales that are neither per row nor per group")
    if codebook is not None:
        books = len(codebook) if codebook.ndim == 2 else 1
        is_table = group_size == 32 and codebook.ndim == 1 and codebook.tolist() == list(IQ4_NL)
        return Codebook(cast(Literal[2, 3, 4], bits), books, group_size, is_table)
    if signed == zero_points:
        raise ValueError("signed codes with zero points" if signed else "indices of a codebook")
    return Affine(cast(Literal[4, 5, 6, 8], bits), group_size, symmetric=not zero_points)
