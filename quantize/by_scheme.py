"""Quantizing a weight by its scheme: from the three kinds of `quantize/schemes/` to codes."""

from torch import Tensor

from edgekit.quantize.affine import quantize
from edgekit.quantize.codebook.fit import fit_codebook
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.schemes.affine import Affine
from edgekit.quantize.schemes.codebook import IQ4_NL, Codebook
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.tensor import QuantizedTensor


def grid_of(scheme: Scheme) -> Grid:
    """Return a scheme's codes: [-127, 127] at 8 bits, [-8, 7] or [0, 15] at 4 bits.

    [-16, 15] at 5 bits, [-32, 31] at 6. XNNPACK, GGUF and ONNX all take -8; at 8 bits the code -128
    gains nothing and the whitepaper's restricted range (arXiv 1806.08342, section 2.2) keeps
    products in 16 bits. Raises ValueError for a scheme whose codes are no numbers.
    """
    if isinstance(scheme, Affine):
        return Grid(scheme.bits, symmetric=scheme.symmetric, restricted=scheme.bits == 8)
    what = "no codes" if scheme.is_float else "indices for codes, on no grid"
    raise ValueError(f"the scheme {scheme.name} has {what}")


def quantize_weight(
    scheme: Scheme, weight: Tensor, range_method: RangeMethod | None = None
) -> QuantizedTensor:
    """Quantize a float weight (channels are axis 0, groups run along the last axis).

    Raises ValueError for the float scheme, a shape that cannot be grouped, infinities, NaN.
    """
    if isinstance(scheme, Codebook):
        return fit_codebooks(scheme, weight)
    return quantize(
        weight,
        grid_of(scheme),
        axis=scheme.axis,
        group_size=scheme.group_size,
        method=range_method or scheme.default_range or "minmax",
    )


def fit_codebooks(
    scheme: Codebook, weight: Tensor, importance: Tensor | None = None
) -> QuantizedTensor:
    """Fit codebooks to a float weight by k-means (`edgekit.quantize.codebook.fit`).

    `importance`, `[columns]` or the weight's shape, weighs squared errors. Raises ValueError for a
    shape that does not fit, infinities, NaN.
    """
    return fit_codebook(
        weight,
        scheme.bits,
        scheme.books,
        group_size=scheme.group_size,
        importance=importance,
        table=IQ4_NL if scheme.is_table else None,
    )
