"""The keys in which a GGUF says how tokens are to be drawn (`general.sampling.*` of gguf-py)."""

import math
from collections.abc import Mapping

import numpy as np

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import GgufFile
from edgekit.formats.gguf.writer import Value

KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
}


def sampling_metadata(settings: Mapping[str, float]) -> dict[str, Value]:
    """Return the keys for settings by llama.cpp's names of its options."""
    return {
        KEYS[name]: np.int32(value) if name == "top_k" else float(value)
        for name, value in settings.items()
    }


def stated_sampling(file: GgufFile) -> dict[str, float]:
    """Return the settings that a file states; EdgekitError for a value that is no number."""
    found: dict[str, float] = {}
    for name, key in KEYS.items():
        value = file.metadata.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise EdgekitError(f"{file.path}: its {key} must be a number, not {value!r:.40}")
        found[name] = int(value) if name == "top_k" else float(value)
    return found
