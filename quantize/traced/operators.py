"""What each ATen operator means to a quantizer: layers, what they fuse, how ranges travel."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)
LINEAR = aten.linear.default
EMBEDDING = aten.embedding.default
BATCH_NORM = aten.batch_norm.default

MATRIX_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, LINEAR)
"""Operators whose products run on integers: activations times weights, plus a bias."""

_OTHER_PRODUCTS = frozenset(
    {
        *("conv3d", "conv_transpose3d", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
        *("bilinear", "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    }
)
"""Operators that may multiply by a weight and have no integer form here, by their packet's name."""

CLAMPS = (aten.relu.default, aten.hardtanh.default, aten.relu6.default)
"""What engines fuse into the layer or the addition before it (whitepaper, section 2.4)."""

FUSES_A_CLAMP = (*MATRIX_LAYERS, aten.add.Tensor)

KEEPS_RANGE = (
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    aten.cat.default,
    *CLAMPS,
)
"""Operators whose result lies in the range of their operands and shares their parameters.

Engines pool, move and join codes as they are. For joining this makes all operands share; clamps
are here for where nothing before them can fuse them.
"""

SOFTMAX = (aten.softmax.int,)
"""Float; ONNX Runtime's integer kernel takes the reciprocal of its output's scale for whole."""

AVERAGES = (aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim)
"""Of those, the operators that compute new values; the others move or select old ones."""

PAIRS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
"""Operators on two tensors of codes; with a number or a constant they stay float."""

NEW_RANGE = (
    *PAIRS,
    aten.silu.default,
    aten.hardswish.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.tanh.default,
    aten.gelu.default,
    aten.elu.default,
    aten.leaky_relu.default,
)
"""Operators on codes whose result has parameters of its own."""


@dataclass(frozen=True)
class Layer:
    """A node that multiplies by a weight: where its parameters stand among the arguments."""

    node: Node
    weight: Node
    bias: Node | None

    @property
    def input(self) -> Node:
        """The activation; for an embedding the indices."""
        name = "indices" if self.node.target == EMBEDDING else "input"
        found = arguments(self.node)[name]
        assert isinstance(found, Node)
        return found

    @property
    def channel_axis(self) -> int:
        """The weight's axis of output channels."""
        return 1 if self.node.target in TRANSPOSED else 0

    @property
    def groups(self) -> int:
        """Groups of a convolution, 1 for other layers."""
        return int(arguments(self.node).get("groups", 1))


def layer_of(node: Node) -> Layer | None:
    """Return the node as a layer; None where it is none or its weight is computed."""
    if node.op != "call_function" or node.target not in (*MATRIX_LAYERS, EMBEDDING):
        return None
    found = arguments(node)
    weight, bias = found["weight"], found.get("bias")
    if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        return None
    return Layer(node, weight, bias)


def other_weights(node: Node) -> list[str]:
    """Return the weights that an operator multiplies by for which there is no integer form.

    Those of a layer, too, whose weight is another parameter moved, as in `linear(x, weight.T)`.
    """
    packet = getattr(node.target, "overloadpacket", None)
    is_other = getattr(packet, "__name__", "") in _OTHER_PRODUCTS
    is_computed = node.target in MATRIX_LAYERS and layer_of(node) is None
    if node.op != "call_function" or not (is_other or is_computed):
        return []
    found = map(_weight_behind, node.all_input_nodes)
    return [str(item.target) for item in found if item is not None and rank(item) >= 2]


def _weight_behind(node: Node) -> Node | None:
    """Return the parameter that a node is, or moves: `x @ weight.T`."""
    while node.op == "call_function" and node.target in KEEPS_RANGE and len(node.args) > 0:
        first = node.args[0]
        if not isinstance(first, Node):
            return None
        node = first
    return node if node.op == "get_attr" else None


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by the names of the operator's schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for number, item in enumerate(schema):
        by_name = node.kwargs.get(item.name, item.default_value)
        found[item.name] = node.args[number] if number < len(node.args) else by_name
    return found


def operator_name(node: Node) -> str:
    """Return what an error calls the operator, as in `aten.nonzero.default`."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return operator_name(node.args[0])  # of one with several results
    return str(node.target)


def numbers(value: int | Sequence[int], count: int) -> list[int]:
    """Return a list argument with one entry per axis: one entry stands for all."""
    found = [value] if isinstance(value, int) else list(value)
    return found * count if len(found) == 1 else found


def rank(node: Node) -> int:
    """Return how many axes the node's tensor has."""
    return len(node.meta["val"].shape)
