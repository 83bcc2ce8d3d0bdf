"""Target `executorch` for a quantized module: a `.pte` whose layers are XNNPACK's integer kernels.

The graph is written with quantize and dequantize operators around float ones, the form in which
XNNPACK's partitioner knows its integer kernels. Codes of activations are int8 there: those of
`QuantizedNetwork` less 128, zero points too.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  registers embedding_*
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  # registers quantized_decomposed
from torch.export import Dim, export
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from edgekit.errors import EdgekitError, one_line
from edgekit.quantize.observers import ActivationParameters
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.network import QuantizedLayer, QuantizedNetwork
from edgekit.quantize.traced.operators import EMBEDDING, TRANSPOSED, Layer, operator_name
from edgekit.quantize.traced.schemes import LayerScheme
from edgekit.quantize.traced.trace import TracedModule, at, copy_graph, returned

MODEL_FILE = "model.pte"
ENGINE = "ExecuTorch"
PACKAGES = ("executorch", "torch")

_decomposed_ops = torch.ops.quantized_decomposed
_OPERATOR = re.compile(r"aten\.\w+")
_SHIFT = 128
_CHOICE = 16
_LEAST_PLANNED = 8
LARGEST_RATIO, SMALLEST_RATIO = 256.0, 2.0**-32
"""XNNPACK's bounds on input scale times weight scale over output scale."""


def check_layers(traced: TracedModule, layers: Mapping[str, tuple[Layer, str]]) -> None:
    """Refuse schemes that XNNPACK's integer kernels cannot hold; it takes every traced input."""
    for layer, name in layers.values():
        scheme = LayerScheme.parse(name)
        if layer.node.target == EMBEDDING:
            continue
        if not scheme.symmetric:
            raise EdgekitError(
                f"{layer.weight.target}: target executorch cannot hold {name}: XNNPACK's integer "
                "kernels take symmetric weights, w8a8, w8a8-tensor, w4a8 and w4a8-tensor"
            )
        grouped = layer.node.target in TRANSPOSED and layer.groups > 1
        if grouped and scheme.granularity == "channel":
            raise EdgekitError(
                f"{layer.weight.target}: target executorch cannot hold {name} for a transposed "
                f"convolution of {layer.groups} groups: XNNPACK takes w8a8-tensor for it"
            )


def check_network(network: QuantizedNetwork) -> None:
    """Refuse, before any work, what XNNPACK's integer kernels cannot hold."""
    check_layers(network.traced, network.schemes())
    for layer in network.layers.values():
        if layer.layer.node.target != EMBEDDING:
            _check_ratio(network, layer, network.weights[layer.weight])


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
    with _refusals(network.traced), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(
            program, transform_passes=[_one_reader_each], partitioner=[XnnpackPartitioner()]
        )
        progress("planning memory")
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    progress("writing the program")
    with path.open("wb") as file:
        lowered.write_to_file(file)


def _one_reader_each(module: GraphModule) -> PassResult:
    """Give each reader of dequantized codes a dequantize operator of its own.

    `on_codes` writes them so, but an operator that ExecuTorch decomposes (softplus, mish) may read
    its input twice. A delegate of XNNPACK's that gives out what it also reads itself computed wrong
    values then (executorch 1.5.1).
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or "dequantize_per_tensor" not in str(node.target):
            continue
        for reader in list(node.users)[1:]:
            with module.graph.inserting_before(reader):
                copy = module.graph.node_copy(node)
            reader.replace_input_with(node, copy)
    module.recompile()
    return PassResult(module, True)


@contextmanager
def _refusals(traced: TracedModule) -> Iterator[None]:
    """Turn what ExecuTorch raises for an operator that it cannot lower into one line naming it."""
    try:
        yield
    except Exception as error:  # its passes raise what they like
        named = {_packet(node): node for node in traced.graph_module.graph.nodes}
        for name in _OPERATOR.findall(str(error)):
            node = named.get(name)
            what = name if node is None else f"{operator_name(node)}{at(node)}"
            raise EdgekitError(f"target executorch has no form of {what}") from error
        raise EdgekitError(f"executorch cannot lower the module: {one_line(error)}") from error


def _packet(node: Node) -> str:
    """Return what ExecuTorch's messages call an operator, without its overload."""
    return str(getattr(node.target, "overloadpacket", ""))


def _export(module: nn.Module, traced: TracedModule) -> torch.export.ExportedProgram:
    example, shapes = traced.example, None
    if traced.max_batch is not None:
        size, largest = _rows_to_trace(traced.max_batch)
        example = tuple(item[:1].repeat_interleave(size, 0) for item in example)
        batch = Dim("batch", min=1, max=largest)
        shapes = tuple({0: batch} for _ in example)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(module, example, dynamic_shapes=shapes, strict=False)


def _rows_to_trace(max_batch: int) -> tuple[int, int]:
    """Return the batch of the example and the largest, for which memory is planned.

    Lowering asks torch which convolution it would choose, which depends on whether the batch is
    below 16, and takes the example's answer for a bound of the batch: 15, or at least 16. The
    latter does no harm, for nothing checks it, unless it leaves one size only.

    Memory is planned for at least 8: XNNPACK's quantized global average is wrong at every batch in
    a file planned for 2 to 4 (executorch 1.5.1), and right in one for 5 or more.
    """
    max_batch = max(max_batch, _LEAST_PLANNED)
    return (2, max_batch) if max_batch < _CHOICE else (max_batch + 1, max_batch + 1)


def on_codes(network: QuantizedNetwork) -> GraphModule:
    """Return the graph with codes as constants, and quantize and dequantize at every edge."""
    module = copy_graph(network.traced.graph_module)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, parameters in network.edges.items():
        _quantize_value(nodes[name], parameters)
    for name, layer in network.layers.items():
        weight = network.weights[layer.weight]
        if nodes[name].target == EMBEDDING:
            _look_up(module, nodes[name], layer.weight, weight)
        else:
            _store_weight(module, nodes[name], layer.weight, weight)
            _store_bias(module, nodes[name], layer)
    _copy_returned_inputs(module)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _delete_unread_tensors(module)
    module.recompile()
    return module


def _quantize_value(node: Node, parameters: ActivationParameters) -> None:
    """Quantize a value once and dequantize it for each reader, as kernels are matched."""
    arguments = (parameters.scale, parameters.zero_point - _SHIFT, -128, 127, torch.int8)
    readers = [user for user in node.users if node.op != "placeholder" or user.op != "output"]
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


def _copy_returned_inputs(module: GraphModule) -> None:
    """Return a copy of an input: the caller's memory is no output's."""
    last = module.graph.output_node()
    with module.graph.inserting_before(last):
        found = [
            module.graph.call_function(torch.ops.aten.clone.default, (node,))
            if node.op == "placeholder"
            else node
            for node in returned(module)
        ]
    last.args = (tuple(found),)


def _store_weight(module: GraphModule, node: Node, name: str, weight: QuantizedTensor) -> None:
    name = name.replace(".", "_")
    codes = _buffer(module, node, f"{name}_codes", weight.codes)
    # Bounds of 4 bits would select kernels that only linear layers have.
    ends = (-127, 127, torch.int8)
    with module.graph.inserting_before(node):
        if weight.axis is None:
            value = module.graph.call_function(
                _decomposed_ops.dequantize_per_tensor.default,
                (codes, float(weight.scales), 0, *ends),
            )
        else:
            scales = _buffer(module, node, f"{name}_scales", weight.scales)
            zeros = torch.zeros(len(weight.scales), dtype=torch.int64)
            value = module.graph.call_function(
                _decomposed_ops.dequantize_per_channel.default,
                (codes, scales, _buffer(module, node, f"{name}_zeros", zeros), weight.axis, *ends),
            )
    node.args = (node.args[0], value, *node.args[2:])


def _look_up(module: GraphModule, node: Node, name: str, weight: QuantizedTensor) -> None:
    """Look up codes and scales by ExecuTorch's own operator, which takes int8 and float zeros."""
    name = name.replace(".", "_")
    shift = 0 if weight.signed else _SHIFT
    codes = (weight.codes.to(torch.int16) - shift).to(torch.int8)
    table = _buffer(module, node, f"{name}_codes", codes)
    scales = _buffer(module, node, f"{name}_scales", weight.scales.expand(len(codes)).contiguous())
    zeros = None
    if weight.zero_points is not None:
        shifted = (weight.zero_points - shift).float().expand(len(codes)).contiguous()
        zeros = _buffer(module, node, f"{name}_zeros", shifted)
    indices = node.args[1]
    node.target = _decomposed_ops.embedding_byte.default
    node.args, node.kwargs = (table, scales, zeros, -128, 127, indices), {}


def _store_bias(module: GraphModule, node: Node, layer: QuantizedLayer) -> None:
    """Store what the bias's codes stand for: XNNPACK's serializer divides by the same scales."""
    if layer.bias is None or layer.bias_scales is None:
        return
    value = (layer.bias.double() * layer.bias_scales.double()).float()
    bias = _buffer(module, node, f"{node.name}_bias", value)
    node.args = (*node.args[:2], bias, *node.args[3:])


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


def write_probe(network: QuantizedNetwork, path: Path, probe: Path) -> list[str]:
    """Write nothing: XNNPACK's delegate shows none of the values inside it."""
    return []


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}
