"""How a model's makers say that its tokens are to be drawn: generation_config.json.

Names are those of llama.cpp's options and of `SamplingParams`; transformers calls the penalty
`repetition_penalty`.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError

GENERATION_CONFIG = "generation_config.json"
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}
OFF: Mapping[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
}
"""What a setting is that is not stated where others are."""


def stated_sampling(folder: Path) -> dict[str, float]:
    """Return the settings that a folder's generation_config.json states, empty where it has none.

    `do_sample` false is a temperature of 0. EdgekitError for a value that is no number.
    """
    file = folder / GENERATION_CONFIG
    if not file.is_file():
        return {}
    raw = load_json_object(file)
    found: dict[str, float] = {}
    for name, key in NAMES.items():
        value = raw.get(key)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise EdgekitError(f"{file}: {key} must be a number, not {value!r:.40}")
        if name == "top_k" and value != int(value):
            raise EdgekitError(f"{file}: {key} must be a whole number, not {value}")
        found[name] = int(value) if name == "top_k" else float(value)
    if raw.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
