"""The resolved table as text and as JSON, for every command that shows one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.common.tables import plain_table
from edgekit.quantize.recipe import Table


def table_json(table: Table, sqnr: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Return one object per row.

    `same_as` names the tensor whose codes a row shares; `sqnr_db` is there when `sqnr` is given,
    null for tensors without quantization noise.
    """
    found = []
    for row in table:
        entry = {**row.to_dict(), "range": row.range}
        if row.tensor in table.shared:
            entry["same_as"] = table.shared[row.tensor]
        if sqnr is not None:
            ratio = sqnr.get(row.tensor, math.inf)
            entry["sqnr_db"] = round(ratio, 2) if math.isfinite(ratio) else None
        found.append(entry)
    return found


def format_table(table: Table, sqnr: Mapping[str, float] | None = None) -> str:
    """Return the table as aligned text with a last line of totals (no newline at the end)."""
    return format_json(table_json(table, sqnr))


def format_json(table: Sequence[Mapping[str, Any]]) -> str:
    """Return what `table_json` gave as `format_table` does."""
    has_sqnr = any("sqnr_db" in entry for entry in table)
    lines = [["tensor", "scheme", "range", "shape", "bytes", *["SQNR dB"] * has_sqnr]]
    for entry in table:
        cells = [
            entry["tensor"],
            _scheme(entry),
            entry["range"] or "-",
            "x".join(map(str, entry["shape"])),
            "shared" if "same_as" in entry else f"{entry['bytes']:,}",
        ]
        if has_sqnr:
            ratio = entry["sqnr_db"]
            cells.append("-" if ratio is None else f"{ratio:.1f}")
        lines.append(cells)
    return f"{plain_table(lines, 'llllrr'[: len(lines[0])])}\n{totals(table)}"


def summary(table: Sequence[Mapping[str, Any]]) -> str:
    """Return what `table_json` gave as a row for each scheme, with `format_json`'s last line."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for entry in table:
        scheme = _scheme(entry)
        counts[scheme] = counts.get(scheme, 0) + 1
        sizes[scheme] = sizes.get(scheme, 0) + (0 if "same_as" in entry else entry["bytes"])
    rows = [[scheme, f"{count:,}", f"{sizes[scheme]:,}"] for scheme, count in counts.items()]
    return f"{plain_table([['scheme', 'tensors', 'bytes'], *rows], 'lrr')}\n{totals(table)}"


def totals(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the last line of a table: the tensors and their bytes, shared ones once."""
    total = json_bytes(table)
    return f"{len(table)} tensors, {total:,} bytes ({total / 1e6:,.1f} MB)"


def scheme_text(scheme: str, stored_as: str | None = None, instead_of: str | None = None) -> str:
    """Return a row's scheme, and what the file holds or was to hold where that is another."""
    if stored_as is not None:
        return f"{scheme}, stored as {stored_as}"
    return scheme if instead_of is None else f"{scheme} instead of {instead_of}"


def _scheme(entry: Mapping[str, Any]) -> str:
    return scheme_text(entry["scheme"], entry.get("stored_as"), entry.get("instead_of"))


def json_bytes(table: Sequence[Mapping[str, Any]]) -> int:
    """Return the bytes of what `table_json` gave; codes that two names share count once."""
    return sum(entry["bytes"] for entry in table if "same_as" not in entry)
