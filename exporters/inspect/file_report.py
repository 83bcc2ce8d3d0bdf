"""What `edgekit inspect` shows of any target's file."""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.common.tables import markdown_table
from edgekit.exporters.inspect.tables import Component, component_table, joined, value_table
from edgekit.formats.artifact.manifest import Manifest, NetworkManifest
from edgekit.quantize.table import scheme_text

_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")

WeightRows = list[tuple[str, str, int, int]]
"""Rows of (kind, scheme, tensors, bytes), summed over the layers."""


@dataclass(frozen=True)
class FileReport:
    """What every target's report has; each target's `Report` adds its own.

    `file_bytes` counts the files of the weights, too. `weights` are the rows of the manifest's
    table, summed over the layers. `manifest` is None for a bare file, `checked_files` where the
    content of the files was not to be compared with it.
    """

    path: Path
    file_bytes: int
    components: list[Component]
    metadata: dict[str, Any]
    weights: WeightRows
    manifest: Manifest | None
    checked_files: int | None

    def facts(self) -> list[str]:
        """Return the target's own lines, after what the file is."""
        return []

    def tables(self) -> list[str]:
        """Return the target's own tables, after those of the weights."""
        return []

    def shown_metadata(self) -> dict[str, Any]:
        """Return the metadata as the table has it."""
        return self.metadata

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON.

        It begins with `ok` and `reason` where the content was compared with the manifest; files
        that differ are no report but a VerificationError.
        """
        names = ("kind", "scheme", "tensors", "bytes")
        rows = [dict(zip(names, row, strict=True)) for row in self.weights]
        manifest = None if self.manifest is None else self.manifest.to_json()
        facts = asdict(self) | {"path": str(self.path), "weights": rows, "manifest": manifest}
        if self.checked_files is None:
            return facts
        return {"ok": True, "reason": self._verdict()[0]} | facts

    def text(self) -> str:
        """Return Markdown tables, first and last the verdict where the content was compared.

        What a file calls itself cannot steer a terminal.
        """
        verdict = self._verdict()
        return joined(
            [
                *verdict,
                *introduction(self.path, self.file_bytes, self.manifest),
                *self.facts(),
                component_table(self.components, self.file_bytes),
                *weight_table(self.weights),
                *self.tables(),
                value_table("metadata", self.shown_metadata()),
                *self._verification(),
                *verdict,
            ]
        )

    def _verdict(self) -> list[str]:
        if self.checked_files is None:
            return []
        whole = (
            "The file has" if self.checked_files == 1 else f"All {self.checked_files} files have"
        )
        return [f"{whole} the content that was exported."]

    def _verification(self) -> list[str]:
        figures = self.manifest.verification if self.manifest else {}
        return [value_table("verification", figures)] if figures else []


def weight_rows(manifest: Manifest | None) -> WeightRows:
    """Sum the manifest's table over the layers; no rows for a bare file."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in manifest.tensors if manifest else ():
        kind = _LAYER.sub("", row.tensor).removesuffix(".weight")
        scheme = scheme_text(row.scheme, row.stored_as, row.instead_of)
        counts[kind, scheme] += 1
        sizes[kind, scheme] += row.bytes
    return [(*key, counts[key], sizes[key]) for key in counts]


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


def weight_table(weights: WeightRows) -> list[str]:
    """Return the manifest's table summed over the layers, or nothing."""
    rows = [[kind, scheme, str(n), f"{size:,}"] for kind, scheme, n, size in weights]
    return [markdown_table(["weights", "scheme", "tensors", "bytes"], rows)] if rows else []
