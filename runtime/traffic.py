"""Bytes that an engine must read to decode one token, from an artifact's own tables."""

from collections.abc import Iterable, Mapping
from typing import Any

from edgekit.devices.fit import EMBEDDING, kv_bytes_per_position
from edgekit.models.config import ModelConfig
from edgekit.runtime.record import Traffic


def decode_traffic(rows: Iterable[Mapping[str, Any]], config: ModelConfig) -> Traffic:
    """Return the bytes per decoded token of a manifest's scheme table.

    Every weight is read once per token except the embedding, of which one row is looked up. The
    head has its own row in the table, in tied models too. The caches hold keys and values of each
    attention layer; the conv state (a few positions) is too small to count.
    """
    weights = sum(
        row["bytes"] // row["shape"][0] if row["tensor"] == EMBEDDING else row["bytes"]
        for row in rows
    )
    return Traffic(weights, kv_bytes_per_position(config))


def count_schemes(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return tensors and bytes per scheme, in the table's order."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        count = counts.setdefault(row["scheme"], {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += row["bytes"]
    return counts
