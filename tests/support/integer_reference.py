"""A quantized network run on integers alone, written independently of torch and of the engines.

Products are summed in int64, checked to fit int32, and requantized by one float64 multiplication.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from edgekit.quantize.traced.network import QuantizedNetwork
from edgekit.quantize.traced.operators import arguments, aten

Codes = NDArray[np.int64]
Reals = NDArray[np.float64]


def run_on_integers(network: QuantizedNetwork, x: NDArray[np.float32]) -> Codes:
    """Return the codes of the only output of a net of convolutions, additions and one head."""
    codes: dict[str, Codes] = {}
    wide: dict[str, Reals] = {}
    for node in network.traced.graph_module.graph.nodes:
        edge = network.edges.get(node.name)
        if node.op == "placeholder":
            assert edge is not None
            steps = np.rint(x.astype(np.float64) / edge.scale) + edge.zero_point
            codes[node.name] = np.clip(steps, 0, 255).astype(np.int64)
            continue
        if node.op != "call_function" or node.name not in network.traced.names:
            continue
        real = _real(network, node, codes, wide)
        if edge is None:
            wide[node.name] = real  # inside a fused kernel: not yet rounded
        else:
            steps = np.rint(real / edge.scale) + edge.zero_point
            codes[node.name] = np.clip(steps, 0, 255).astype(np.int64)
    return codes[network.traced.outputs[0].name]


def _real(
    network: QuantizedNetwork, node: Node, codes: dict[str, Codes], wide: dict[str, Reals]
) -> Reals:
    """What a node computes, from integers, as exact reals."""
    layer = network.layers.get(node.name)
    if layer is not None:
        edge = network.edges[layer.layer.input.name]
        weight = network.weights[layer.weight]
        w = weight.codes.numpy().astype(np.int64)
        if weight.zero_points is not None:
            w = w - weight.zero_points.numpy().reshape(-1, *[1] * (w.ndim - 1))
        centred = codes[layer.layer.input.name] - edge.zero_point
        if node.target == aten.linear.default:
            sums = centred @ w.T
        else:
            found = arguments(node)
            sums = _convolve(centred, w, found["stride"], found["padding"], found["groups"])
        shape = (1, -1, *[1] * (sums.ndim - 2))
        if layer.bias is not None:
            sums = sums + layer.bias.numpy().astype(np.int64).reshape(shape)
        assert np.abs(sums).max() < 2**31
        scales = weight.scales.numpy().astype(np.float64).reshape(-1)
        return sums * (edge.scale * scales).reshape(shape if len(scales) > 1 else (1,) * sums.ndim)
    values: list[Any] = [
        (codes[item.name] - network.edges[item.name].zero_point) * network.edges[item.name].scale
        if item.name in codes
        else wide[item.name]
        for item in node.all_input_nodes
        if item.name in codes or item.name in wide
    ]
    result: Reals
    if node.target == aten.add.Tensor:
        result = values[0] + values[1]
    elif node.target == aten.relu.default:
        result = np.maximum(values[0], 0)
    elif node.target == aten.hardtanh.default:
        result = np.clip(values[0], 0, 6)
    elif node.target in (aten.adaptive_avg_pool2d.default, aten.mean.dim):
        result = values[0].mean((2, 3), keepdims=True)
    else:
        assert node.target in (aten.reshape.default, aten.squeeze.dims), node.target
        result = values[0].reshape(values[0].shape[:2])
    return result


def _convolve(x: Codes, w: Codes, stride: list[int], padding: list[int], groups: int) -> Codes:
    """Slide over the input tap by tap."""
    (sh, sw), (ph, pw) = stride, padding
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    height = (x.shape[2] - w.shape[2]) // sh + 1
    width = (x.shape[3] - w.shape[3]) // sw + 1
    out = np.zeros((len(x), len(w), height, width), np.int64)
    inputs, outputs = w.shape[1], len(w) // groups
    for g in range(groups):
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                part = x[:, g * inputs : (g + 1) * inputs]
                part = part[:, :, i : i + sh * height : sh, j : j + sw * width : sw]
                taps = w[g * outputs : (g + 1) * outputs, :, i, j]
                out[:, g * outputs : (g + 1) * outputs] += np.einsum("nchw,oc->nohw", part, taps)
    return out
