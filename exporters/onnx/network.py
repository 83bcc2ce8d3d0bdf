"""Target `onnx` for a quantized module: operators that onnxruntime fuses to integer kernels."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.onnx.network_graph import ModuleGraph
from edgekit.exporters.onnx.network_operators import ELEMENT_TYPES
from edgekit.quantize.traced.network import QuantizedNetwork
from edgekit.quantize.traced.operators import EMBEDDING, LINEAR, Layer, rank
from edgekit.quantize.traced.schemes import LayerScheme
from edgekit.quantize.traced.trace import TracedModule

MODEL_FILE = "model.onnx"
ENGINE = "onnxruntime"
PACKAGES = ("onnx", "onnxruntime", "torch")
OPSET = 21
IR_VERSION = 10
"""What opset 21 came with."""
_LARGEST_FILE = 2**31 - 1
"""Protocol buffers end here."""


def check_layers(traced: TracedModule, layers: Mapping[str, tuple[Layer, str]]) -> None:
    """Refuse schemes and types that onnxruntime's integer kernels and the file cannot hold."""
    for layer, name in layers.values():
        scheme = LayerScheme.parse(name)
        per_channel = scheme.granularity == "channel" and not scheme.symmetric
        if per_channel and layer.node.target != EMBEDDING:
            raise EdgekitError(
                f"{layer.weight.target}: target onnx cannot hold {name}: onnxruntime's "
                "QLinearConv takes one zero point for all channels, w8a8, w8a8-tensor and "
                "w8a8-tensor-affine"
            )
        if layer.node.target == LINEAR and rank(layer.input) < 2:
            raise EdgekitError(f"{layer.weight.target}: target onnx takes inputs with a batch axis")
    inputs = [(f"input {node.name!r}", node) for node in traced.inputs]
    names = [f"result {name!r}" for name in traced.results.names]
    for name, node in [*inputs, *zip(names, traced.outputs, strict=True)]:
        dtype = node.meta["val"].dtype
        if dtype not in ELEMENT_TYPES:
            allowed = ", ".join(str(item).removeprefix("torch.") for item in ELEMENT_TYPES)
            raise EdgekitError(f"target onnx: {name} is {dtype}, it must be one of {allowed}")


def check_network(network: QuantizedNetwork) -> None:
    """Refuse, before any work, what onnxruntime's integer kernels cannot hold."""
    check_layers(network.traced, network.schemes())


def write_module(network: QuantizedNetwork, path: Path, progress: Callable[[str], None]) -> None:
    """Write the `.onnx`; inputs and outputs have the traced module's names, both as floats."""
    check_network(network)
    progress("writing the graph")
    model = helper.make_model(
        ModuleGraph(network).build(),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="edgekit",
    )
    if model.ByteSize() > _LARGEST_FILE:
        raise EdgekitError(f"the module has {model.ByteSize() / 1e9:.1f} GB, .onnx holds 2.1 GB")
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def write_probe(network: QuantizedNetwork, path: Path, probe: Path) -> list[str]:
    """Write the file again with the codes of every value that has some as outputs behind its own.

    onnxruntime runs the same kernels: what it fuses ends in codes, which others may read.
    """
    graph = ModuleGraph(network)
    graph.build()
    model = onnx.load(str(path))
    held = {name for node in model.graph.node for name in node.output}
    tensors = graph.codes()
    for name in tensors:
        if name not in held:
            raise VerificationError(f"verification: the file has no tensor {name}")
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    onnx.save(model, str(probe))
    return list(tensors.values())


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}
