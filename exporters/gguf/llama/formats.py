"""llama.cpp's own formats by name.

They are no schemes: scales of scales, and which tensor gets which type, are llama.cpp's, and only a
GGUF holds them.
"""

import re
from dataclasses import dataclass

from edgekit.errors import EdgekitError
from edgekit.quantize.recipe import Recipe, uniform
from edgekit.quantize.scheme import FLOAT, FORMS


@dataclass(frozen=True)
class LlamaFormat:
    """A format by llama-quantize's name and its number in `enum llama_ftype` (include/llama.h)."""

    name: str
    file_type: int


FORMATS = {
    each.name: each
    for each in (
        LlamaFormat("Q4_0", 2),
        LlamaFormat("Q8_0", 7),
        LlamaFormat("Q4_K_M", 15),
        LlamaFormat("Q5_K_M", 17),
        LlamaFormat("Q6_K", 18),
        LlamaFormat("IQ4_NL", 25),
    )
}
_LIKE_ONE = re.compile(r"(I?Q|TQ|MXFP|NVFP)\d\w*", re.IGNORECASE | re.ASCII)
_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own


def find_format(name: str) -> LlamaFormat | None:
    """Return the format of a name in any case, None where it is none of llama.cpp's."""
    upper = name.upper()
    return FORMATS.get(_ALIASES.get(upper, upper))


def check_format(name: str) -> None:
    """Refuse a name of llama.cpp's kind that `find_format` does not find, naming the formats."""
    if _LIKE_ONE.fullmatch(name) and find_format(name) is None:
        raise EdgekitError(
            f"unknown format {name!r:.40}: of llama.cpp's own there are {', '.join(FORMATS)}; "
            f"schemes are {FORMS}"
        )


def format_recipe(form: LlamaFormat) -> Recipe:
    """Return what a format asks of edgekit's own quantizers: nothing."""
    return Recipe(uniform(FLOAT).rules, name=form.name)
