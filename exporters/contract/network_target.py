"""What every target of modules offers, and how one is found by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from edgekit.common.tables import plain_table
from edgekit.exporters.registry import TARGETS
from edgekit.quantize.table import scheme_text, totals
from edgekit.quantize.traced.network import QuantizedNetwork
from edgekit.quantize.traced.operators import Layer
from edgekit.quantize.traced.schemes import LayerScheme
from edgekit.quantize.traced.trace import TracedModule


class ModuleTarget(Protocol):
    """A module of this package that writes a quantized network as one kind of file.

    `MODEL_FILE` is the file that the engine opens, `ENGINE` what people call the engine.
    """

    MODEL_FILE: str
    ENGINE: str

    def check_layers(self, traced: TracedModule, layers: Mapping[str, tuple[Layer, str]]) -> None:
        """Refuse what no weights are needed to see: schemes of layers, types of inputs.

        `layers` gives the quantized layers by node name, with their schemes.
        """
        ...

    def check_network(self, network: QuantizedNetwork) -> None:
        """Refuse, before any work, what the engine's integer kernels cannot hold, naming it."""
        ...

    def write_module(
        self, network: QuantizedNetwork, path: Path, progress: Callable[[str], None]
    ) -> None:
        """Write the file; codes and scales verbatim."""
        ...

    def write_probe(self, network: QuantizedNetwork, path: Path, probe: Path) -> list[str]:
        """Write a file again with the codes of values as further outputs, to verify it by.

        Returns the nodes of those codes, in order; nothing is written and it is empty where the
        engine shows nothing of what it computes inside.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions that decided the file's bytes."""
        ...


def find_module_target(name: str) -> ModuleTarget:
    """Return the target of that name; EdgekitError for another."""
    return cast(ModuleTarget, TARGETS.load(name, "network"))


def tensor_rows(
    traced: TracedModule, layers: Mapping[str, tuple[Layer, str]]
) -> list[dict[str, Any]]:
    """Return one row for each weight, bias and other parameter, as the manifest holds them.

    `layers` gives the quantized ones by node name, with their schemes. Bytes are those of the
    file: 4-bit codes take a byte each, for 8-bit kernels run them, and `stored_as` says so.
    """
    rows: dict[str, dict[str, Any]] = {}
    biases = {}
    for layer, scheme in layers.values():
        name, shape = str(layer.weight.target), tuple(traced.parameter(layer.weight).shape)
        parsed = LayerScheme.parse(scheme)
        scales = shape[layer.channel_axis] if parsed.granularity == "channel" else 1
        row = _row(name, scheme, shape, math.prod(shape) + 4 * scales)
        if parsed.bits == 4:
            row["stored_as"] = replace(parsed, bits=8).name
        rows.setdefault(name, row)
        if layer.bias is not None:
            bias = str(layer.bias.target)
            size = traced.parameter(layer.bias).numel()
            biases[bias] = _row(bias, "int32", (size,), 4 * size)
    rows |= biases
    for node in traced.graph_module.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name not in rows:
            value = traced.parameter(node)
            size = value.numel() * value.element_size()
            rows[name] = _row(name, "float", tuple(value.shape) or (1,), size)
    return list(rows.values())


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as an aligned table with a last line of totals (no newline at the end)."""
    lines = [["tensor", "scheme", "shape", "bytes"]]
    lines += [
        [
            row["tensor"],
            scheme_text(row["scheme"], row.get("stored_as")),
            "x".join(map(str, row["shape"])),
            f"{row['bytes']:,}",
        ]
        for row in rows
    ]
    return f"{plain_table(lines, 'lllr')}\n{totals(rows)}"


def _row(name: str, scheme: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    return {"tensor": name, "scheme": scheme, "shape": list(shape), "bytes": size}
