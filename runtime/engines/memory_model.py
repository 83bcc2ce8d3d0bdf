"""What `fit` must know of an engine."""

from dataclasses import dataclass

FLOAT_BYTES = 4


@dataclass(frozen=True)
class MemoryModel:
    """What an engine does with memory; by default what takes most.

    `packs_linears` False is an engine that multiplies from the file's bytes; `cache_bytes` are
    those of one number in the KV cache; `whole_prompt` is one that takes any prompt in one pass.
    """

    packs_linears: bool = True
    cache_bytes: int = FLOAT_BYTES
    whole_prompt: bool = True
