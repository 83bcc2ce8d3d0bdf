"""llama.cpp's own formats by name."""

from dataclasses import dataclass


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
