"""What a GGUF is made of, read from its head: llama.cpp's own files and those of others alike."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.sizes import size_of
from edgekit.exporters.inspect.file_report import FileReport, weight_rows
from edgekit.exporters.inspect.tables import (
    Component,
    count_table,
)
from edgekit.formats.artifact.manifest import Manifest
from edgekit.formats.gguf.file import STRING, GgufArray, GgufFile, GgufTensor

_LONGEST_ARRAY = 64
_LONGEST_TEXT = 120
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Report(FileReport):
    """A GGUF's.

    `types` counts tensors by ggml's types, `bits_per_weight` are those of all tensors together;
    `metadata` holds short arrays whole and of others what they are of.
    """

    types: dict[str, int]
    parameters: int
    bits_per_weight: float

    def facts(self) -> list[str]:
        """How many weights there are, and of how many bits."""
        return [f"{self.parameters:,} weights, {self.bits_per_weight:.2f} bits each"]

    def tables(self) -> list[str]:
        """The types of the tensors."""
        return [count_table("type", "tensors", self.types)]

    def shown_metadata(self) -> dict[str, Any]:
        """Lists in a line each, long texts cut."""
        return {key: _shown(value) for key, value in self.metadata.items()}


def report(path: Path, manifest: Manifest | None, checked: int | None) -> Report:
    """Report on a GGUF; EdgekitError where it is foreign or corrupt."""
    file = GgufFile.open(path)
    tensors = list(file.tensors.values())
    size = size_of(file)
    return Report(
        path=path,
        file_bytes=file.file_bytes,
        components=_components(file, tensors),
        types=dict(Counter(tensor.type for tensor in tensors).most_common()),
        parameters=size.weights,
        bits_per_weight=size.bits_per_weight,
        metadata={key: _brief(path, key, value) for key, value in file.metadata.items()},
        weights=weight_rows(manifest),
        manifest=manifest,
        checked_files=checked,
    )


def _components(file: GgufFile, tensors: Iterable[GgufTensor]) -> list[Component]:
    """Give every byte to one part; what is left of the file is padding."""
    tied = _HEAD not in file.tensors
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in tensors:
        name = _component(tensor, tied)
        counts[name] += 1
        sizes[name] += tensor.nbytes
    parts = [Component(name, counts[name], sizes[name]) for name in counts]
    parts.append(Component("metadata and tokenizer", len(file.metadata), file.head_bytes))
    rest = file.file_bytes - sum(part.bytes for part in parts)
    return [*parts, Component("padding", 0, rest)]


def _component(tensor: GgufTensor, tied: bool) -> str:
    if tensor.name == _EMBEDDING:
        return f"embedding{' and head' if tied else ''}, {tensor.type}"
    if tensor.name == _HEAD:
        return f"head, {tensor.type}"
    is_linear = len(tensor.shape) > 1 and not tensor.name.endswith(".shortconv.conv.weight")
    return f"{'linears' if is_linear else 'norms, convolutions'}, {tensor.type}"


def _brief(path: Path, key: str, value: Any) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return a value that JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        raise EdgekitError(f"{path}: its {key!r:.60} is {value}, no finite number")
    if not isinstance(value, GgufArray):
        return value
    if value.count > _LONGEST_ARRAY:
        return f"{value.count:,} {'texts' if value.type == STRING else 'numbers'}"
    if value.type == STRING:
        return value.strings()
    return [_brief(path, key, number) for number in value.numbers().tolist()]


def _shown(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[:_LONGEST_TEXT]}... ({len(value):,} characters)"
    return value
