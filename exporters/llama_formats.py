"""llama.cpp's own formats by name.

They are no schemes: scales of scales, and which tensor gets which type, are llama.cpp's, and only a
GGUF holds them.
"""

from dataclasses import dataclass

from edgekit.quantize.recipe import Recipe, uniform
from edgekit.quantize.scheme import FLOAT


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
_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own


def find_format(name: str) -> LlamaFormat | None:
    """Return the format of a name in any case, None where it is none of llama.cpp's."""
    upper = name.upper()
    return FORMATS.get(_ALIASES.get(upper, upper))


def format_recipe(form: LlamaFormat) -> Recipe:
    """Return what a format asks of edgekit's own quantizers: nothing."""
    return Recipe(uniform(FLOAT).rules, name=form.name)
