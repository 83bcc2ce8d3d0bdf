"""The grammar of schemes' names: `float`, `w8`, `w4g32`, `cb3x8`, ..."""

import re
from typing import Literal, cast

from edgekit.errors import EdgekitError
from edgekit.quantize.schemes import super_blocks
from edgekit.quantize.schemes.affine import Affine
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.floats import FLOAT, Float

Scheme = Float | Affine | Codebook
"""How one weight is stored."""

FORMS = (
    "float, w8, w4, w8gN, w4gN, w4gNa (N weights share a scale, a multiple of 32, at "
    "8 bits also 16; a: and a zero point), w6g16, w5g32, cb4, cb3, cb2 with gN and xN (N "
    "codebooks, one for each group of rows), cb4nl"
)
STATIC = re.compile(r"w([48])a8(-tensor)?(-affine)?")
"""Names of schemes whose activations have static ranges: `edgekit.quantize.traced.schemes`."""

_ALONE: dict[str, Scheme] = {
    "float": FLOAT,
    "cb4nl": Codebook(4, group_size=32, is_table=True),
    "w5g32": Affine(5, 32),
    "w6g16": Affine(6, super_blocks.GROUP),
}
_AFFINE = re.compile(r"w([48])(?:g([1-9][0-9]{0,5})(a?))?")
_CODEBOOK = re.compile(r"cb([234])(?:g([1-9][0-9]{0,5}))?(?:x([1-9][0-9]{0,3}))?")


def parse_scheme(name: str) -> Scheme:
    """Return the scheme of a name; EdgekitError with the allowed forms for any other."""
    if name in _ALONE:
        return _ALONE[name]
    if STATIC.fullmatch(name):
        raise EdgekitError(
            f"scheme {name} has static ranges of activations and is for modules: a language "
            "model's are found at run time, so give it w8 or w4g32",
            field="scheme",
        )
    affine, codebook = _AFFINE.fullmatch(name), _CODEBOOK.fullmatch(name)
    try:
        if codebook is not None:
            return _codebook(codebook)
        if affine is None:
            raise EdgekitError(f"unknown scheme {name!r}: allowed are {FORMS}", field="scheme")
        bits: Literal[4, 8] = 4 if affine[1] == "4" else 8
        return Affine(bits, _number(affine[2]), symmetric=not affine[3])
    except ValueError as error:
        raise EdgekitError(
            f"unknown scheme {name!r}: {error}; allowed are {FORMS}", field="scheme"
        ) from error


def _codebook(match: re.Match[str]) -> Codebook:
    if match[3] == "1":
        raise ValueError("x1 is said by leaving it out")
    bits = cast(Literal[2, 3, 4], int(match[1]))
    return Codebook(bits, _number(match[3]) or 1, _number(match[2]))


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits)
