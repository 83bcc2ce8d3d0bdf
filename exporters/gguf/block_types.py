"""ggml's types of blocks: which holds a scheme's codes, of how many weights, in how many bytes."""

from edgekit.formats.gguf.file import TYPES
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.schemes.super_blocks import COLUMNS

BLOCK = 32
SUPER_BLOCK = COLUMNS
BLOCKS = {name: (weights, nbytes) for name, weights, nbytes in TYPES.values()}
"""Weights and bytes of a block by the name of its type."""

_BY_BITS = {5: "Q5_0", 6: "Q6_K", 8: "Q8_0"}


def block_type(scheme: Scheme) -> str:
    """Return ggml's name of the type that holds a scheme's codes; ValueError for float."""
    if scheme.bits is None:
        raise ValueError("the float scheme has no codes")
    if scheme.bits in _BY_BITS:
        return _BY_BITS[scheme.bits]
    if isinstance(scheme, Codebook):
        if scheme.is_table:
            return "IQ4_NL"
        raise ValueError(f"ggml has no blocks for the codebooks of {scheme.name}")
    return "Q4_0" if scheme.symmetric else "Q4_1"
