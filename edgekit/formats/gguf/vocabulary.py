"""Token ids of a text by llama.cpp's own tokenizer, over a vocabulary that is loaded already."""

import ctypes
from types import ModuleType
from typing import Any

from edgekit.errors import EdgekitError

_AT_THE_ENDS = 2  # bos and eos; each other token has at least one byte


def llama_token_ids(
    llama: ModuleType,
    vocabulary: Any,  # noqa: ANN401 - a pointer of llama.cpp's
    data: bytes,
    *,
    add_special: bool,
    parse_special: bool,
) -> list[int]:
    """Return the ids of a text's UTF-8 bytes; `llama` is the library that holds the vocabulary.

    `add_special` adds bos and eos as the file wants them; without `parse_special` the spelling of a
    special token is only letters.
    """
    size = len(data) + _AT_THE_ENDS
    tokens = (ctypes.c_int32 * size)()
    count = llama.llama_tokenize(
        vocabulary, data, len(data), tokens, size, add_special, parse_special
    )
    if count < 0:
        raise EdgekitError(f"llama.cpp cannot tokenize a text of {len(data):,} bytes")
    return tokens[:count]
