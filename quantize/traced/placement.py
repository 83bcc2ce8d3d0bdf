"""Which layers are quantized, and where in the graph values become codes.

A value has one form for all that read it: codes with the parameters of its edge, or float.
Following the engines' kernels (and section 2.4 of arXiv 1806.08342), nothing is quantized between
a layer or an addition and the clamp that follows it; pooling, moving and joining share their
operands' parameters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from edgekit.errors import EdgekitError
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.operators import (
    CLAMPS,
    EMBEDDING,
    FUSES_A_CLAMP,
    KEEPS_RANGE,
    MATRIX_LAYERS,
    NEW_RANGE,
    PAIRS,
    SOFTMAX,
    Layer,
    arguments,
    aten,
    layer_of,
    operator_name,
    other_weights,
)
from edgekit.quantize.traced.schemes import LayerRecipe, LayerRule
from edgekit.quantize.traced.trace import TracedModule, at


@dataclass(frozen=True)
class Placement:
    """A traced module with what is to be quantized in it.

    layers  the quantized layers by node name, with their rules
    edges   the edge of each value that has codes, by node name: values of one edge share their
            parameters, and an edge has the name of its first value
    recipe  the recipe's name
    codes   those of weights, by name, that were chosen before, in training or by a file
    """

    traced: TracedModule
    layers: dict[str, tuple[Layer, LayerRule]]
    edges: dict[str, str]
    recipe: str
    codes: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    def values(self) -> Iterator[Node]:
        """Yield the nodes whose values have codes, in order."""
        return (node for node in self.traced.graph_module.graph.nodes if node.name in self.edges)

    def members(self) -> dict[str, list[str]]:
        """Return the values that share each edge's parameters, node names by the edge's name."""
        found: dict[str, list[str]] = {}
        for node, edge in self.edges.items():
            found.setdefault(edge, []).append(node)
        return found

    def of_softmax(self) -> set[str]:
        """Return the edges with a value of a softmax, moved or not, whose scales are to be 1/n.

        QLinearSoftmax of ONNX Runtime multiplies by floor(1 / scale)
        (onnxruntime/contrib_ops/cpu/quantization/qlinear_softmax.cc): at 1/300.9 it would be a
        code off.
        """
        return {self.edges[node.name] for node in self.values() if _is_softmax(node)}

    def schemes(self) -> dict[str, tuple[Layer, str]]:
        """Return each quantized layer with its scheme's name, by node name."""
        return {name: (layer, rule.scheme.name) for name, (layer, rule) in self.layers.items()}


def _is_softmax(node: Node) -> bool:
    """Whether a node is a softmax, or what such a one moved, pooled or joined is."""
    if node.target in SOFTMAX:
        return True
    return node.target in KEEPS_RANGE and any(map(_is_softmax, node.all_input_nodes))


def place(traced: TracedModule, recipe: LayerRecipe) -> Placement:
    """Apply a recipe to a graph.

    EdgekitError for a rule that takes no layer, and for one that would quantize a weight of an
    operator that has no integer form: it may be left float, but not silently.
    """
    nodes = list(traced.graph_module.graph.nodes)
    layers = [layer for layer in map(layer_of, nodes) if layer is not None]
    others = {name: node for node in nodes for name in other_weights(node)}
    names = [*(str(layer.weight.target) for layer in layers), *others]
    rules = recipe.resolve(list(dict.fromkeys(names)))
    for name, node in others.items():
        if name in rules and not rules[name].scheme.is_float:
            raise EdgekitError(
                f"{name}: {rules[name].scheme.name} cannot hold it: {operator_name(node)}"
                f"{at(node)} runs on floats only; give it the scheme float in a recipe"
            )
    chosen: dict[str, tuple[Layer, LayerRule]] = {}
    for layer in layers:
        rule = rules.get(str(layer.weight.target))
        if rule is not None and not rule.scheme.is_float:
            chosen[layer.node.name] = (layer, rule)
    edges = _Edges(nodes)
    products = [layer for layer, _ in chosen.values() if layer.node.target != EMBEDDING]
    found = edges.quantized(products)
    by_name = {node.name: traced.names[edge.name] for node, edge in found}
    return Placement(traced, chosen, by_name, recipe.name)


def end_of_chain(node: Node) -> Node:
    """Return the last node that engines fuse with a layer or an addition: itself or a clamp.

    XNNPACK fuses an addition with ReLU only, and would run one that another clamp follows in float.
    """
    clamps = CLAMPS if node.target in MATRIX_LAYERS else (aten.relu.default,)
    (user, *others) = list(node.users) or [node]
    fused = not others and user.op == "call_function" and user.target in clamps
    return user if fused else node


class _Edges:
    """Values joined to edges, and the edges that have codes."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = [node for node in nodes if _is_float_value(node)]
        self._position = {node: number for number, node in enumerate(self._nodes)}
        self._root = {node: node for node in self._nodes}
        self._ends = {
            node: end_of_chain(node) for node in self._nodes if node.target in FUSES_A_CLAMP
        }
        self._inside = _inside(self._ends)
        fused = set(self._ends.values())
        for node in self._nodes:
            if node.target in KEEPS_RANGE and node not in fused and _operands(node) is not None:
                for operand in _operands(node) or ():
                    self._join(operand, node)

    def quantized(self, layers: list[Layer]) -> list[tuple[Node, Node]]:
        """Return every value with codes and the first value of its edge."""
        marked = set()
        for layer in layers:
            if layer.input not in self._root:
                raise EdgekitError(f"{layer.weight.target}: its input is no float tensor")
            marked |= {self._find(layer.input), self._find(self._ends[layer.node])}
        while True:
            more = {self._find(end) for end in self._follow(marked)} - marked
            if not more:
                break
            marked |= more
        return [
            (node, self._find(node))
            for node in self._nodes
            if node not in self._inside and self._find(node) in marked
        ]

    def _follow(self, marked: set[Node]) -> Iterator[Node]:
        """Yield the results of operators all of whose operands have codes."""
        for node in self._nodes:
            if node.target in NEW_RANGE:
                operands = _operands(node)
                if operands and all(self._find(operand) in marked for operand in operands):
                    yield self._ends.get(node, node)

    def _join(self, a: Node, b: Node) -> None:
        a, b = self._find(a), self._find(b)
        first, second = sorted((a, b), key=self._position.__getitem__)
        self._root[second] = first

    def _find(self, node: Node) -> Node:
        while self._root[node] is not node:
            node = self._root[node]
        return node


def _inside(ends: dict[Node, Node]) -> set[Node]:
    """Return the values that exist only inside a fused kernel."""
    inside = set()
    for node, end in ends.items():
        while node is not end:
            inside.add(node)
            (node,) = node.users
    return inside


def _operands(node: Node) -> list[Node] | None:
    """Return the float tensors that an operator takes; None where one is a constant or a number."""
    operands = [item for item in node.all_input_nodes if _is_float_value(item)]
    if any(item.op == "get_attr" for item in node.all_input_nodes):
        return None
    if node.target in PAIRS and (_has_number(node) or arguments(node).get("alpha", 1) != 1):
        return None
    return operands


def _has_number(node: Node) -> bool:
    return not all(isinstance(item, Node) for item in node.args[:2])


def _is_float_value(node: Node) -> bool:
    value = node.meta.get("val")
    computed = node.op in ("placeholder", "call_function")
    return computed and isinstance(value, torch.Tensor) and value.dtype == torch.float32
