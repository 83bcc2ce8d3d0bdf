"""What the reports of every target share: components, the manifest's part, tables."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from edgekit.common.tables import markdown_table
from edgekit.formats.artifact.manifest import Manifest, NetworkManifest
from edgekit.quantize.table import scheme_text

TABLES = "norms, convolutions, tables"
_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")

WeightRows = list[tuple[str, str, int, int]]
"""Rows of (kind, scheme, tensors, bytes), summed over the layers."""


@dataclass(frozen=True)
class Component:
    """A part of the file; each byte belongs to exactly one, so their sum is the file's size."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and the component they are a part of."""

    name: str
    offset: int
    size: int


def components(pieces: Sequence[Piece], file_bytes: int) -> list[Component]:
    """Give every byte to the first piece that holds it; what none holds is padding."""
    counts, sizes, end = Counter[str](), Counter[str](), 0
    order = {name: number for number, name in enumerate(dict.fromkeys(p.name for p in pieces))}
    for piece in sorted(pieces, key=lambda piece: (piece.offset, order[piece.name])):
        new = piece.offset + piece.size - max(end, piece.offset)
        if new > 0:
            counts[piece.name] += 1
            sizes[piece.name] += new
            end = piece.offset + piece.size
    found = [Component(name, counts[name], sizes[name]) for name in order if sizes[name]]
    return [*found, Component("padding", 0, file_bytes - sum(sizes.values()))]


def name_shared(pieces: Sequence[Piece]) -> list[Piece]:
    """Name bytes that are embedding and head at once as both."""
    embedding, head = (
        {(p.offset, p.size): p.name for p in pieces if p.name.startswith(kind)}
        for kind in ("embedding, ", "head, ")
    )
    both = {span: f"{embedding[span]}, and {head[span]}" for span in embedding.keys() & head.keys()}
    return [Piece(both.get((p.offset, p.size), p.name), p.offset, p.size) for p in pieces]


def weight_rows(manifest: Manifest | None) -> WeightRows:
    """Sum the manifest's table over the layers; no rows for a bare file."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in manifest.tensors if manifest else ():
        kind = _LAYER.sub("", row.tensor).removesuffix(".weight")
        scheme = scheme_text(row.scheme, row.stored_as, row.instead_of)
        counts[kind, scheme] += 1
        sizes[kind, scheme] += row.bytes
    return [(*key, counts[key], sizes[key]) for key in counts]


class Weighed(Protocol):
    """A report, a dataclass, on a file whose manifest may have a table of weights."""

    @property
    def path(self) -> Path:
        """The model file."""
        ...

    @property
    def weights(self) -> WeightRows:
        """The manifest's table, summed over the layers."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, None for a bare file."""
        ...


def report_json(report: Weighed) -> dict[str, Any]:
    """Return a report for `--json`: its path as text, the rows of its weights as objects."""
    names = ("kind", "scheme", "tensors", "bytes")
    rows = [dict(zip(names, row, strict=True)) for row in report.weights]
    facts: dict[str, Any] = asdict(cast(Any, report))
    manifest = None if report.manifest is None else report.manifest.to_json()
    return facts | {"path": str(report.path), "weights": rows, "manifest": manifest}


def is_module(manifest: Manifest | None) -> bool:
    """Whether a manifest is that of a module."""
    return isinstance(manifest, NetworkManifest)


def introduction(path: Path, file_bytes: int, manifest: Manifest | None) -> list[str]:
    """Return what the file is, and by what it was made where there is a manifest."""
    megabytes = f" ({file_bytes / 1e6:,.1f} MB)" if file_bytes >= 1e6 else ""
    size = f"{path}: {file_bytes:,} bytes{megabytes}"
    if manifest is None:
        return [size]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [size, *_contents(manifest), f"made by {versions}"]


def _contents(manifest: Manifest) -> list[str]:
    """Return which model it is, and what it takes."""
    about = f"{manifest.model_id}, recipe {manifest.recipe}"
    if isinstance(manifest, NetworkManifest):
        largest = manifest.max_batch
        batches = f"batches of {f'up to {largest}' if largest else 'one size'}"
        taken, given = (
            ", ".join(f"{item.name} {item.dtype}" for item in items)
            for items in (manifest.inputs, manifest.outputs)
        )
        return [f"{about}, a module, {batches}", f"takes {taken}; gives {given or 'no name'}"]
    codes = "" if manifest.codes_sha256 is None else f", codes by {manifest.method}"
    return [f"{about}{codes}, context {manifest.context}"]


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


def checks(manifest: Manifest | None, checked: int | None) -> list[str]:
    """Return the figures of the verification and what `--check` found."""
    figures = manifest.verification if manifest else {}
    parts = [value_table("verification", figures)] if figures else []
    if checked is not None:
        whole = "The file has" if checked == 1 else f"All {checked} files have"
        parts.append(f"{whole} the content that was exported.")
    return parts


def joined(parts: Sequence[str]) -> str:
    """Join the parts of a report; nothing in it can steer a terminal."""
    text = "\n\n".join(parts)
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
