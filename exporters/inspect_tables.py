"""What the reports of every target share: components, the manifest's part, tables."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.tables import markdown_table

_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")

WeightRows = list[tuple[str, str, int, int]]
"""Rows of (kind, scheme, tensors, bytes), summed over the layers."""


@dataclass(frozen=True)
class Component:
    """A part of the file; each byte belongs to exactly one, so their sum is the file's size."""

    name: str
    tensors: int
    bytes: int


def weight_rows(manifest: Mapping[str, Any] | None) -> WeightRows:
    """Sum the manifest's table over the layers; no rows for a bare file."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in manifest["tensors"] if manifest else ():
        kind = _LAYER.sub("", row["tensor"]).removesuffix(".weight")
        counts[kind, row["scheme"]] += 1
        sizes[kind, row["scheme"]] += row["bytes"]
    return [(*key, counts[key], sizes[key]) for key in counts]


def weights_json(weights: WeightRows) -> list[dict[str, Any]]:
    """Return the rows as objects."""
    names = ("kind", "scheme", "tensors", "bytes")
    return [dict(zip(names, row, strict=True)) for row in weights]


def introduction(path: Path, file_bytes: int, manifest: Mapping[str, Any] | None) -> list[str]:
    """Return what the file is, and by what it was made where there is a manifest."""
    size = f"{path}: {file_bytes:,} bytes ({file_bytes / 1e6:,.1f} MB)"
    if manifest is None:
        return [size]
    model, recipe, context = manifest["model"]["id"], manifest.get("recipe"), manifest["context"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return [size, f"{model}, recipe {recipe}, context {context}", f"made by {versions}"]


def component_table(components: Sequence[Component], file_bytes: int) -> str:
    """Return the components with their shares of the file."""
    rows = [
        [
            part.name,
            str(part.tensors) if part.tensors else "-",
            f"{part.bytes:,}",
            f"{part.bytes / file_bytes:.1%}",
        ]
        for part in components
    ]
    return markdown_table(["in the file", "pieces", "bytes", "share"], rows)


def weight_table(weights: WeightRows) -> list[str]:
    """Return the manifest's table summed over the layers, or nothing."""
    rows = [[kind, scheme, str(n), f"{size:,}"] for kind, scheme, n, size in weights]
    return [markdown_table(["weights", "scheme", "tensors", "bytes"], rows)] if rows else []


def count_table(title: str, unit: str, counts: Mapping[str, int]) -> str:
    """Return names with counts."""
    rows = [[name, str(count)] for name, count in counts.items()]
    return markdown_table([title, unit], rows or [["none", "0"]])


def value_table(title: str, values: Mapping[str, Any]) -> str:
    """Return names with values of any type."""
    rows = [
        [str(name), f"{value:.6g}" if isinstance(value, float) else str(value)]
        for name, value in values.items()
    ]
    return markdown_table([title, "value"], rows or [["none", "-"]])


def checks(manifest: Mapping[str, Any] | None, checked: int | None) -> list[str]:
    """Return the figures of the verification and what `--check` found."""
    verification = (manifest or {}).get("verification")
    parts = [value_table("verification", verification)] if isinstance(verification, dict) else []
    if checked is not None:
        parts.append(f"All {checked} files have the content that was exported.")
    return parts


def joined(parts: Sequence[str]) -> str:
    """Join the parts of a report; nothing in it can steer a terminal."""
    text = "\n\n".join(parts)
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
