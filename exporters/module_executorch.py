"""Target `executorch` for a quantized module: a `.pte` whose layers are XNNPACK's integer kernels.

The graph is written with quantize and dequantize operators around float ones, the form in which
XNNPACK's partitioner knows its integer kernels. Codes of activations are int8 there: those of
`QuantizedNetwork` less 128, zero points too.
"""

import copy
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers quantized_decomposed
from torch.export import Dim, export
from torch.fx import GraphModule, Node

from edgekit.errors import EdgekitError
from edgekit.quantize.observers import ActivationParameters
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.network import QuantizedLayer, QuantizedNetwork
from edgekit.quantize.traced.operators import EMBEDDING, TRANSPOSED
from edgekit.quantize.traced.trace import TracedModule

MODEL_FILE = "model.pte"
ENGINE = "ExecuTorch"
PACKAGES = ("executorch", "torch")

_decomposed_ops = torch.ops.quantized_decomposed
_SHIFT = 128
LARGEST_RATIO, SMALLEST_RATIO = 256.0, 2.0**-32
"""XNNPACK's bounds on input scale times weight scale over output scale."""


def check_network(network: QuantizedNetwork) -> None:
    """Refuse, before any work, what XNNPACK's integer kernels cannot hold."""
    for layer in network.layers.values():
        weight = network.weights[layer.weight]
        if weight.zero_points is not None:
            raise EdgekitError(
                f"{layer.weight}: target executorch cannot hold {layer.scheme}: XNNPACK's integer "
                "kernels take symmetric weights, w8a8, w8a8-tensor, w4a8 and w4a8-tensor"
            )
        grouped = layer.layer.node.target in TRANSPOSED and layer.layer.groups > 1
        if grouped and weight.granularity == "channel":
            raise EdgekitError(
                f"{layer.weight}: target executorch cannot hold {layer.scheme} for a transposed "
                f"convolution of {layer.layer.groups} groups: XNNPACK takes w8a8-tensor for it"
            )
        if layer.output is not None:
            _check_ratio(network, layer, weight)


def _check_ratio(network: QuantizedNetwork, layer: QuantizedLayer, weight: QuantizedTensor) -> None:
    assert layer.output is not None
    entering, leaving = network.parameters(layer.layer.input), network.parameters(layer.output)
    ratios = weight.scales * entering.scale / leaving.scale
    if not bool(((ratios < LARGEST_RATIO) & (ratios >= SMALLEST_RATIO)).all()):
        raise EdgekitError(
            f"{layer.weight}: XNNPACK takes input scale times weight scale over output scale from "
            f"2**-32 to 256, got {float(ratios.min()):.3g} to {float(ratios.max()):.3g}: is a "
            "channel of its weight or output all but zero?"
        )


def write_module(network: QuantizedNetwork, path: Path, progress: Callable[[str], None]) -> None:
    """Write the `.pte`; its only method is `forward`."""
    check_network(network)
    progress("tracing")
    program = _export(on_codes(network), network.traced)
    progress("lowering to XNNPACK")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        progress("planning memory")
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(
                passes=[QuantFusionPass()],
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    progress("writing the program")
    with path.open("wb") as file:
        lowered.write_to_file(file)


def _export(module: nn.Module, traced: TracedModule) -> torch.export.ExportedProgram:
    shapes = None
    if traced.max_batch is not None:
        batch = Dim("batch", min=1, max=traced.max_batch)
        shapes = tuple({0: batch} for _ in traced.example)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(module, traced.example, dynamic_shapes=shapes, strict=False)


def on_codes(network: QuantizedNetwork) -> GraphModule:
    """Return the graph with codes as constants, and quantize and dequantize at every edge."""
    module = copy.deepcopy(network.traced.graph_module)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, parameters in network.edges.items():
        _quantize_value(nodes[name], parameters)
    for name, layer in network.layers.items():
        _store_weight(module, nodes[name], layer, network.weights[layer.weight])
        _store_bias(module, nodes[name], layer)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _delete_unread_tensors(module)
    module.recompile()
    return module


def _quantize_value(node: Node, parameters: ActivationParameters) -> None:
    """Quantize a value once and dequantize it for each reader, as kernels are matched."""
    arguments = (parameters.scale, parameters.zero_point - _SHIFT, -128, 127, torch.int8)
    readers = list(node.users)
    graph = node.graph
    with graph.inserting_after(node):
        quantized = graph.call_function(
            _decomposed_ops.quantize_per_tensor.default, (node, *arguments)
        )
    with graph.inserting_after(quantized):
        for reader in readers:
            value = graph.call_function(
                _decomposed_ops.dequantize_per_tensor.default, (quantized, *arguments)
            )
            reader.replace_input_with(node, value)


def _store_weight(
    module: GraphModule, node: Node, layer: QuantizedLayer, weight: QuantizedTensor
) -> None:
    name = layer.weight.replace(".", "_")
    low, high = (-127, 127) if node.target != EMBEDDING else (-128, 127)
    codes = _buffer(module, node, f"{name}_codes", weight.codes)
    with module.graph.inserting_before(node):
        if weight.axis is None:
            value = module.graph.call_function(
                _decomposed_ops.dequantize_per_tensor.default,
                (codes, float(weight.scales), 0, low, high, torch.int8),
            )
        else:
            scales = _buffer(module, node, f"{name}_scales", weight.scales)
            zeros = _buffer(
                module, node, f"{name}_zeros", torch.zeros(len(weight.scales), dtype=torch.int64)
            )
            value = module.graph.call_function(
                _decomposed_ops.dequantize_per_channel.default,
                (codes, scales, zeros, weight.axis, low, high, torch.int8),
            )
    node.replace_input_with(_named(node, "weight"), value)


def _store_bias(module: GraphModule, node: Node, layer: QuantizedLayer) -> None:
    """Store what the bias's codes stand for: XNNPACK's serializer divides by the same scales."""
    if layer.bias is None or layer.bias_scales is None:
        return
    value = (layer.bias.double() * layer.bias_scales.double()).float()
    bias = _buffer(module, node, f"{node.name}_bias", value)
    node.args = (*node.args[:2], bias, *node.args[3:])


def _named(node: Node, name: str) -> Node:
    from edgekit.quantize.traced.operators import arguments

    found = arguments(node)[name]
    assert isinstance(found, Node)
    return found


def _buffer(module: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    if not hasattr(module, name):
        module.register_buffer(name, value)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _delete_unread_tensors(module: GraphModule) -> None:
    """Delete the float parameters that codes replaced."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    for name in names:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}
