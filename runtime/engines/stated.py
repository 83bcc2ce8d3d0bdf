"""What a model file says of itself, read without its engine's library."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgekit.runtime.decode_bytes import Traffic
from edgekit.runtime.engines.registry import ENGINES


@dataclass(frozen=True)
class Stated:
    """The name of the model, the bytes of each type of tensors, and the positions it was made for.

    `schemes` counts tensors and bytes; `traffic` is None for a model whose bytes per token depend
    on more than depth; `sampling` are the settings of `SamplingParams` that the file states.
    """

    model: str | None
    schemes: Mapping[str, Mapping[str, int]]
    traffic: Traffic | None
    context: int
    sampling: Mapping[str, float]


def stated_by(path: Path, engine: str) -> Stated | None:
    """Return what an engine's file says, None where its files do not; EdgekitError for damage."""
    if not ENGINES.can(engine, "facts"):
        return None
    return cast(Stated, ENGINES.load(engine, "facts").stated(path))
