"""What every target of modules offers, and how one is found by name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

from edgekit.errors import EdgekitError
from edgekit.quantize.traced.network import QuantizedNetwork

# Each module is a `ModuleTarget`; only the one asked for is imported, with its libraries.
MODULE_TARGETS = {
    "executorch": "edgekit.exporters.module_executorch",
    "onnx": "edgekit.exporters.module_onnx",
}


class ModuleTarget(Protocol):
    """A module of this package that writes a quantized network as one kind of file.

    `MODEL_FILE` is the file that the engine opens, `ENGINE` what people call the engine.
    """

    MODEL_FILE: str
    ENGINE: str

    def check_network(self, network: QuantizedNetwork) -> None:
        """Refuse, before any work, what the engine's integer kernels cannot hold, naming it."""
        ...

    def write_module(
        self, network: QuantizedNetwork, path: Path, progress: Callable[[str], None]
    ) -> None:
        """Write the file; codes and scales verbatim."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions that decided the file's bytes."""
        ...


def find_module_target(name: str) -> ModuleTarget:
    """Return the target of that name; EdgekitError for another."""
    if name == "gguf":
        raise EdgekitError(
            "target gguf holds no modules: llama.cpp runs the architectures it knows; allowed are "
            f"{', '.join(MODULE_TARGETS)}"
        )
    if name not in MODULE_TARGETS:
        raise EdgekitError(f"unknown target {name!r:.60}: allowed are {', '.join(MODULE_TARGETS)}")
    return cast(ModuleTarget, importlib.import_module(MODULE_TARGETS[name]))


def tensor_rows(network: QuantizedNetwork) -> list[dict[str, Any]]:
    """Return one row for each weight, bias and other parameter, as the manifest holds them.

    Bytes are those of the file: 4-bit codes take a byte each, for 8-bit kernels run them.
    """
    schemes = {layer.weight: layer.scheme for layer in network.layers.values()}
    rows = [
        _row(name, schemes[name], codes.shape, codes.codes.numel() + 4 * codes.scales.numel())
        for name, codes in network.weights.items()
    ]
    quantized = set(network.weights)
    for layer in network.layers.values():
        if layer.bias is not None and layer.layer.bias is not None:
            name = str(layer.layer.bias.target)
            quantized.add(name)
            rows.append(_row(name, "int32", tuple(layer.bias.shape), 4 * layer.bias.numel()))
    for node in network.traced.graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in quantized:
            value = network.traced.parameter(node)
            shape = tuple(value.shape) or (1,)
            rows.append(_row(str(node.target), "float", shape, 4 * value.numel()))
            quantized.add(str(node.target))
    return rows


def _row(name: str, scheme: str, shape: tuple[int, ...], size: int) -> dict[str, Any]:
    return {"tensor": name, "scheme": scheme, "shape": list(shape), "bytes": size}
