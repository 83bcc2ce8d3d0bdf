"""What a model file's weights are, and the bytes that decoding one token must read of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.formats.artifact.parts import TensorRow
from edgekit.models.config import ModelConfig
from edgekit.quantize.names import EMBEDDING
from edgekit.quantize.table import scheme_text
from edgekit.runtime.decode_bytes import Traffic
from edgekit.runtime.engines.stated import stated_by
from edgekit.runtime.fit import kv_bytes_per_position
from edgekit.runtime.model_files import ModelFile


@dataclass(frozen=True)
class WeightSummary:
    """Which model a file holds and in what; nothing where nobody says it.

    `model` has at least the key `id`; `schemes` counts tensors and bytes.
    """

    model: Mapping[str, Any]
    schemes: Mapping[str, Mapping[str, int]]
    traffic: Traffic | None


def holdings_of(file: ModelFile) -> WeightSummary:
    """Read an artifact's manifest, and a file's own table, which counts what is in the file."""
    stated = stated_by(file.path, file.engine)
    if file.manifest is not None:
        rows = file.manifest.tensors
        traffic = None if stated is None else stated.traffic
        if stated is None:
            traffic = decode_traffic(rows, ModelConfig.load(file.place))
        return WeightSummary(file.manifest.model.to_json(), count_schemes(rows), traffic)
    if stated is not None:
        return WeightSummary({"id": stated.model}, stated.schemes, stated.traffic)
    return WeightSummary({"id": None}, {}, None)


def decode_traffic(rows: Iterable[TensorRow], config: ModelConfig) -> Traffic:
    """Return the bytes per decoded token of a manifest's scheme table.

    Every weight is read once per token except the embedding, of which one row is looked up. The
    head has its own row in the table, in tied models too. The caches hold keys and values of each
    attention layer; the conv state (a few positions) is too small to count.
    """
    weights = sum(
        row.bytes // row.shape[0] if row.tensor == EMBEDDING else row.bytes for row in rows
    )
    return Traffic(weights, kv_bytes_per_position(config))


def count_schemes(rows: Iterable[TensorRow]) -> dict[str, dict[str, int]]:
    """Return tensors and bytes per scheme, in the table's order."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        scheme = scheme_text(row.scheme, row.stored_as, row.instead_of)
        count = counts.setdefault(scheme, {"tensors": 0, "bytes": 0})
        count["tensors"] += 1
        count["bytes"] += row.bytes
    return counts
