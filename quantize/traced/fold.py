"""Batch norm in inference form, folded into the layer before it (arXiv 1806.08342, 3.2.2).

`W' = gamma W / sigma` and `b' = beta + gamma (b - mu) / sigma` with `sigma = sqrt(var + eps)`,
per output channel, computed in float64 and rounded once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import Node

from edgekit.quantize.traced.operators import (
    BATCH_NORM,
    LINEAR,
    MATRIX_LAYERS,
    Layer,
    arguments,
    aten,
    layer_of,
    rank,
)
from edgekit.quantize.traced.trace import TracedModule, copy_graph


def fold_batch_norms(traced: TracedModule) -> TracedModule:
    """Return the graph without batch norms; the one given and the module stay as they are.

    A batch norm that no layer precedes becomes a depthwise convolution of one tap, which can be
    quantized like any other; its weight keeps the batch norm's name.
    """
    graph_module = copy_graph(traced.graph_module)
    result = replace(traced, graph_module=graph_module, names=dict(traced.names))
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target == BATCH_NORM:
            # Its own numbers come from before: another use of it may have been written already.
            _fold(result, node, *_factor_and_offset(traced, node))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return result


def _fold(traced: TracedModule, node: Node, factor: Tensor, offset: Tensor) -> None:
    layer = layer_before(node)
    if layer is None:
        _stand_alone(traced, node, factor, offset)
        return
    bias = None if layer.bias is None else traced.parameter(layer.bias)
    weight, bias = folded(layer, traced.parameter(layer.weight), bias, factor, offset)
    _set_weight(traced, layer, weight)
    _set_bias(traced, layer, bias)
    node.replace_all_uses_with(layer.node)
    node.graph.erase_node(node)


def layer_before(node: Node) -> Layer | None:
    """Return the layer into which a batch norm folds, None where it stands alone."""
    x = arguments(node)["input"]
    # The channels of a linear layer are its last axis, those of a batch norm the second.
    fits = x.target in MATRIX_LAYERS and (x.target != LINEAR or rank(x) == 2)
    return layer_of(x) if fits and len(x.users) == 1 else None


def _factor_and_offset(traced: TracedModule, node: Node) -> tuple[Tensor, Tensor]:
    """Return gamma / sigma and beta - gamma mu / sigma, float64 [channels]."""
    found = arguments(node)
    mean, variance = (traced.parameter(found[name]) for name in ("running_mean", "running_var"))
    gamma, beta = (
        None if found[name] is None else traced.parameter(found[name])
        for name in ("weight", "bias")
    )
    return factor_and_offset(
        mean, sigma_of(variance, found["eps"]), *scale_and_shift(mean, gamma, beta)
    )


def sigma_of(variance: Tensor, eps: float) -> Tensor:
    """Return the standard deviation that a batch norm divides by, float64 [channels]."""
    return (variance.double() + eps).sqrt()


def scale_and_shift(
    mean: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a batch norm's gamma and beta, 1 and 0 where it has none, float64 like its mean."""
    like = mean.double()
    return (
        torch.ones_like(like) if gamma is None else gamma.double(),
        torch.zeros_like(like) if beta is None else beta.double(),
    )


def factor_and_offset(
    mean: Tensor, sigma: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gamma / sigma and beta - gamma mu / sigma, float64 [channels]."""
    factor = gamma / sigma
    return factor, beta - mean.double() * factor


def folded(
    layer: Layer, weight: Tensor, bias: Tensor | None, factor: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias with a batch norm folded into them, float32."""
    shift = offset if bias is None else bias.double() * factor + offset
    return (weight * _along_channels(factor, weight, layer)).float(), shift.float()


def _along_channels(factor: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """Shape a factor per output channel so that it multiplies the weight."""
    if layer.channel_axis == 0:
        return factor.view(-1, *[1] * (weight.ndim - 1))
    # Transposed [in, out / groups, ...]: the inputs of one group meet its outputs only.
    per_group = factor.view(layer.groups, 1, -1)
    spread = per_group.expand(-1, len(weight) // layer.groups, -1)
    return spread.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _stand_alone(traced: TracedModule, node: Node, factor: Tensor, offset: Tensor) -> None:
    """Write a batch norm that follows no layer as a depthwise convolution or, of vectors, a sum."""
    found = arguments(node)
    owner = str(found["running_mean"].target).rpartition(".")[0] or node.name
    taps = [1] * (rank(node) - 2)
    weight = _attribute(traced, node, f"{owner}.weight", factor.view(-1, *taps))
    if len(taps) in (1, 2):
        weight = _attribute(traced, node, f"{owner}.weight", factor.view(-1, 1, *taps))
        bias = _attribute(traced, node, f"{owner}.bias", offset)
        node.target = aten.conv1d.default if len(taps) == 1 else aten.conv2d.default
        padding = [0] * len(taps)
        node.args = (found["input"], weight, bias, taps, padding, taps, len(factor))
    else:  # what integer kernels do not know
        bias = _attribute(traced, node, f"{owner}.bias", offset.view(-1, *taps))
        with node.graph.inserting_before(node):
            product = node.graph.call_function(aten.mul.Tensor, (found["input"], weight))
        product.meta = dict(node.meta)
        traced.names[product.name] = f"{owner}.mul"
        node.target, node.args = aten.add.Tensor, (product, bias)
    node.kwargs = {}


def _set_weight(traced: TracedModule, layer: Layer, value: Tensor) -> None:
    """Give a layer its own weight, under the old name where no other layer uses that."""
    name = str(layer.weight.target)
    if len(layer.weight.users) > 1:
        name = f"{name}_of_{layer.node.name}"
    weight = _attribute(traced, layer.node, name, value)
    layer.node.update_arg(1, weight)


def _set_bias(traced: TracedModule, layer: Layer, value: Tensor) -> None:
    """Give a layer its own bias, beside its weight."""
    owner, _, weight = str(_weight_node(layer).target).rpartition(".")
    leaf = weight.replace("weight", "bias") if "weight" in weight else f"{weight}_bias"
    name = f"{owner}.{leaf}" if owner else leaf
    if layer.bias is not None and len(layer.bias.users) > 1:
        name = f"{name}_of_{layer.node.name}"
    bias = _attribute(traced, layer.node, name, value)
    layer.node.args = (*layer.node.args[:2], bias, *layer.node.args[3:])


def _weight_node(layer: Layer) -> Node:
    """Return the weight that the layer reads now, which `_set_weight` may have renamed."""
    node = layer.node.args[1]
    assert isinstance(node, Node)
    return node


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
