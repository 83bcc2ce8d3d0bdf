"""Batch norm in inference form, folded into the layer before it (arXiv 1806.08342, 3.2.2).

`W' = gamma W / sigma` and `b' = beta + gamma (b - mu) / sigma` with `sigma = sqrt(var + eps)`,
per output channel, computed in float64 and rounded once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from edgekit.quantize.traced.operators import (
    BATCH_NORM,
    MATRIX_LAYERS,
    Layer,
    arguments,
    aten,
    layer_of,
    rank,
)
from edgekit.quantize.traced.trace import TracedModule


def fold_batch_norms(traced: TracedModule) -> TracedModule:
    """Return the graph without batch norms; the one given and the module stay as they are.

    A batch norm that no layer precedes becomes a depthwise convolution of one tap, which can be
    quantized like any other; its weight keeps the batch norm's name.
    """
    graph_module = _copy(traced.graph_module)
    result = replace(traced, graph_module=graph_module, names=dict(traced.names))
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target == BATCH_NORM:
            _fold(result, node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return result


def _fold(traced: TracedModule, node: Node) -> None:
    factor, offset = _factor_and_offset(traced, node)
    x = arguments(node)["input"]
    layer = layer_of(x) if x.target in MATRIX_LAYERS and len(x.users) == 1 else None
    if layer is None:
        _as_convolution(traced, node, factor, offset)
        return
    weight = traced.parameter(layer.weight)
    bias = torch.zeros(()) if layer.bias is None else traced.parameter(layer.bias)
    owner = str(layer.weight.target).rpartition(".")[0]
    _set(traced, layer, weight * _along_channels(factor, weight, layer), owner)
    _set_bias(traced, layer, bias.double() * factor + offset, owner)
    node.replace_all_uses_with(layer.node)
    node.graph.erase_node(node)


def _factor_and_offset(traced: TracedModule, node: Node) -> tuple[Tensor, Tensor]:
    """Return gamma / sigma and beta - gamma mu / sigma, float64 [channels]."""
    found = arguments(node)
    mean = traced.parameter(found["running_mean"]).double()
    sigma = (traced.parameter(found["running_var"]).double() + found["eps"]).sqrt()
    gamma = torch.ones_like(mean) if found["weight"] is None else traced.parameter(found["weight"])
    beta = torch.zeros_like(mean) if found["bias"] is None else traced.parameter(found["bias"])
    factor = gamma.double() / sigma
    return factor, beta.double() - mean * factor


def _along_channels(factor: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """Shape a factor per output channel so that it multiplies the weight."""
    if layer.channel_axis == 0:
        return factor.view(-1, *[1] * (weight.ndim - 1))
    # Transposed [in, out / groups, ...]: the inputs of one group meet its outputs only.
    per_group = factor.view(layer.groups, 1, -1)
    spread = per_group.expand(-1, len(weight) // layer.groups, -1)
    return spread.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _as_convolution(traced: TracedModule, node: Node, factor: Tensor, offset: Tensor) -> None:
    found = arguments(node)
    owner = _owner(found, node)
    taps = rank(node) - 2
    x = found["input"]
    shape = (-1, 1, *[1] * taps)
    weight = _attribute(traced, node, f"{owner}.weight", factor.view(shape))
    bias = _attribute(traced, node, f"{owner}.bias", offset)
    if taps not in (1, 2):  # [batch, channels] or volumes: nothing that integer kernels know
        _as_product(traced, node, x, factor, offset, owner)
        return
    node.target = aten.conv1d.default if taps == 1 else aten.conv2d.default
    one, none = [1] * taps, [0] * taps
    node.args, node.kwargs = (x, weight, bias, one, none, one, len(factor)), {}


def _as_product(
    traced: TracedModule, node: Node, x: Node, factor: Tensor, offset: Tensor, owner: str
) -> None:
    shape = (-1, *[1] * (rank(node) - 2))
    weight = _attribute(traced, node, f"{owner}.weight", factor.view(shape))
    bias = _attribute(traced, node, f"{owner}.bias", offset.view(shape))
    with node.graph.inserting_before(node):
        product = node.graph.call_function(aten.mul.Tensor, (x, weight))
    product.meta = dict(node.meta)
    traced.names[product.name] = f"{owner}.mul"
    node.target, node.args, node.kwargs = aten.add.Tensor, (product, bias), {}


def _owner(found: dict[str, Node], node: Node) -> str:
    return str(found["running_mean"].target).rpartition(".")[0] or node.name


def _set(traced: TracedModule, layer: Layer, value: Tensor, owner: str) -> None:
    """Give a layer its own weight, under the old name where no other layer uses that."""
    name = str(layer.weight.target)
    if len(layer.weight.users) > 1:
        name = f"{name}_of_{layer.node.name}"
    weight = _attribute(traced, layer.node, name, value)
    layer.node.update_arg(1, weight)


def _set_bias(traced: TracedModule, layer: Layer, value: Tensor, owner: str) -> None:
    name = f"{owner}.bias" if owner else "bias"
    shared = layer.bias is not None and len(layer.bias.users) > 1
    if shared or str(layer.weight.target) != f"{owner}.weight" or len(layer.weight.users) > 1:
        name = f"{name}_of_{layer.node.name}"
    bias = _attribute(traced, layer.node, name, value)
    layer.node.args = (*layer.node.args[:2], bias, *layer.node.args[3:])


def _attribute(traced: TracedModule, before: Node, name: str, value: Tensor) -> Node:
    """Store a tensor in the graph's module and return a node that reads it."""
    module = traced.graph_module
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if hasattr(place, leaf):
        delattr(place, leaf)
    place.register_parameter(leaf, nn.Parameter(value.float().contiguous(), requires_grad=False))
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = value.float()
    return node


def _copy(module: GraphModule) -> GraphModule:
    """Copy the graph and the tree of modules; tensors are shared."""
    import copy

    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)
