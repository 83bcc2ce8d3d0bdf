"""The ONNX graph of a quantized module.

Layers, additions and averages stand between DequantizeLinear and QuantizeLinear, the form in which
onnxruntime finds QLinearConv, QGemm, QLinearAdd and QLinearAveragePool. What moves, joins or
clamps codes, and maximum pooling, works on the codes themselves. Codes of activations are uint8.
"""

import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.fx import Node

from edgekit.errors import EdgekitError
from edgekit.exporters.onnx.network_operators import (
    ELEMENT_TYPES,
    Attribute,
    Constant,
    convolution_attributes,
    onnx_pads,
    onnx_sizes,
    operands,
    translate,
)
from edgekit.exporters.onnx.transposed import SubPixel, sub_pixel
from edgekit.quantize.observers import LEVELS, ActivationParameters
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.arithmetic import clamp_ends
from edgekit.quantize.traced.network import QuantizedLayer, QuantizedNetwork
from edgekit.quantize.traced.operators import (
    AVERAGES,
    CLAMPS,
    EMBEDDING,
    KEEPS_RANGE,
    LINEAR,
    TRANSPOSED,
    arguments,
    aten,
    operator_name,
    rank,
)
from edgekit.quantize.traced.trace import at

_CONSTANTS = (
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.scalar_tensor.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.eye.default,
)
"""Operators whose result is always the same where no size of theirs varies."""
_OF_SIZES = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.floordiv: "Div",  # of sizes, none below 0
}
_SMALL = 16
"""Constants of up to as many elements are stored once."""


class ModuleGraph:
    """A graph under construction: each value is a float tensor, or codes, by name."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self._network = network
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._shared: dict[tuple[Any, ...], str] = {}
        self._floats: dict[Node, str] = {}
        self._codes: dict[Node, str] = {}
        self._finish: dict[Node, Callable[[str], str]] = {}
        self._prefix = ""

    def build(self) -> onnx.GraphProto:
        """Translate every node; EdgekitError for an operator without a translation."""
        traced = self._network.traced
        for node in traced.graph_module.graph.nodes:
            self._prefix = traced.names.get(node.name, node.name)
            if node.op == "placeholder":
                self._define(node, node.name)
            elif node.op == "get_attr":
                self._parameter(node)
            elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                self._compute(node)
        inputs = [_declared(node, node.name) for node in traced.inputs]
        outputs = []
        for name, node in zip(traced.results.names, traced.outputs, strict=True):
            value = node.name if node.op == "placeholder" else self.float_of(node)
            self._nodes.append(helper.make_node("Identity", [value], [name]))
            outputs.append(_declared(node, name))
        return helper.make_graph(self._nodes, "module", inputs, outputs, self._initializers)

    def codes(self) -> dict[str, str]:
        """Return the names of the graph's codes, each with the node that they are first of."""
        found: dict[str, str] = {}
        for node, name in self._codes.items():
            found.setdefault(name, node.name)
        return found

    def emit(self, operator: str, inputs: list[str], **attributes: Attribute) -> str:
        """Add a node with one output; return the output's name."""
        name = f"{self._prefix}/{operator}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Constant, dtype: torch.dtype) -> str:
        """Add an initializer, once for equal small ones; return its name.

        Not of int8: where onnxruntime makes weights uint8 (`x64quantprecision`), it fails on a
        zero point that two layers share.
        """
        array = torch.as_tensor(value, dtype=dtype).contiguous().numpy()
        shared = array.size <= _SMALL and dtype != torch.int8
        key = (array.dtype.str, array.shape, array.tobytes()) if shared else None
        if key in self._shared:
            return self._shared[key]
        name = f"/constant_{len(self._initializers)}"  # no output's name has a slash
        self._initializers.append(numpy_helper.from_array(array, name))
        if key is not None:
            self._shared[key] = name
        return name

    def float_of(self, node: Node) -> str:
        """Return the name of a value as floats (indices as they are)."""
        if node in self._floats:
            return self._floats[node]
        arguments = self._of_edge(self._network.parameters(node))
        self._floats[node] = self.emit("DequantizeLinear", [self._codes[node], *arguments])
        return self._floats[node]

    def _define(self, node: Node, name: str) -> None:
        """Record a computed float value: as codes where it has some, which are all that is read."""
        parameters = self._network.edges.get(node.name)
        if parameters is None:
            self._floats[node] = name
            return
        codes = self.emit("QuantizeLinear", [name, *self._of_edge(parameters)])
        if node.target in CLAMPS:
            codes = self._clip(node, codes)
        self._codes[node] = self._finish[node](codes) if node in self._finish else codes

    def _of_edge(self, parameters: ActivationParameters) -> list[str]:
        scale = self.constant(parameters.scale, torch.float32)
        return [scale, self.constant(parameters.zero_point, torch.uint8)]

    def _parameter(self, node: Node) -> None:
        """Store a float parameter that some operator reads as it is."""
        if any(user.name not in self._network.layers for user in node.users):
            value = self._network.traced.parameter(node)
            self._floats[node] = self.constant(value, value.dtype)

    def _compute(self, node: Node) -> None:
        layer = self._network.layers.get(node.name)
        first = next(iter(node.all_input_nodes), node)
        if layer is not None:
            result = self._layer(node, layer)
        elif self._stays_codes(node):
            self._codes[node] = self._on_codes(node)
            return
        elif node.target in CLAMPS and node.name in self._network.edges:
            # On codes, after quantizing: engines fuse a layer with what quantizes its result.
            result = self.float_of(first)
            if first in self._finish:
                self._finish[node] = self._finish[first]
        elif node.target in _CONSTANTS and not node.all_input_nodes:
            value = node.target(*node.args, **node.kwargs)
            result = self.constant(value, value.dtype)
        elif node.target == aten.scalar_tensor.default and isinstance(node.args[0], Node):
            result = self.size(node.args[0])
        else:
            result = translate(self, node, [self.float_of(item) for item in operands(node)])
        self._define(node, result)

    def size(self, node: Node | int) -> str:
        """Return the name of a size as an int64 scalar, also of one that varies with the batch."""
        if not isinstance(node, Node):
            return self.constant(node, torch.int64)
        if node.target == aten.sym_size.int:
            x, axis = arguments(node)["self"], int(arguments(node)["dim"])
            whole = self.emit("Shape", [self._codes.get(x) or self._floats[x]])
            return self.emit("Gather", [whole, self.constant(axis, torch.int64)])
        if node.target in _OF_SIZES:
            return self.emit(_OF_SIZES[node.target], [self.size(item) for item in node.args])  # type: ignore[arg-type]
        raise EdgekitError(f"target onnx has no form of {operator_name(node)} of a size{at(node)}")

    def _clip(self, node: Node, codes: str) -> str:
        """Clamp codes, unless the clamp's ends are theirs."""
        parameters = self._network.parameters(node)
        ends = parameters.codes(torch.tensor(clamp_ends(node))).tolist()
        if ends == [0, LEVELS - 1]:
            return codes
        return self.emit("Clip", [codes, *(self.constant(end, torch.uint8) for end in ends)])

    def _stays_codes(self, node: Node) -> bool:
        """Whether a node only moves, joins or selects codes of one edge."""
        if node.target not in KEEPS_RANGE or node.target in AVERAGES:
            return False
        here = self._network.edges.get(node.name)
        return here is not None and all(item in self._codes for item in operands(node))

    def _on_codes(self, node: Node) -> str:
        names = [self._codes[item] for item in operands(node)]
        parameters = self._network.parameters(node)
        if node.target in CLAMPS:
            return self._clip(node, *names)
        if node.target == aten.constant_pad_nd.default:
            found = arguments(node)
            pads = self.constant(onnx_pads(found["pad"], rank(node)), torch.int64)
            code = parameters.codes(torch.tensor(float(found["value"])))
            return self.emit("Pad", [*names, pads, self.constant(code, torch.uint8)])
        return translate(self, node, names)

    def _layer(self, node: Node, layer: QuantizedLayer) -> str:
        weight = self._network.weights[layer.weight]
        entering = layer.layer.input
        if node.target == EMBEDDING:
            return self._embedding(self.float_of(entering), weight)
        if node.target == LINEAR and rank(entering) != 2:
            return self._linear(node, layer, weight)
        x = self.float_of(entering)
        if node.target in TRANSPOSED:
            return self._transposed(node, x, layer, weight)
        inputs = [x, self._weight(weight), *self._bias(layer)]
        if node.target == LINEAR:
            return self.emit("Gemm", inputs, transB=1)
        return self.emit("Conv", inputs, **convolution_attributes(node))

    def _linear(self, node: Node, layer: QuantizedLayer, weight: QuantizedTensor) -> str:
        """Write a linear layer over several axes: QGemm takes rows, so codes become rows."""
        entering = layer.layer.input
        rows = self.constant([-1, weight.shape[1]], torch.int64)
        codes = self.emit("Reshape", [self._codes[entering], rows])
        edge = self._of_edge(self._network.parameters(entering))
        x = self.emit("DequantizeLinear", [codes, *edge])
        self._finish[node] = lambda result: self.emit(
            "Reshape", [result, self.constant(onnx_sizes(node), torch.int64)]
        )
        return self.emit("Gemm", [x, self._weight(weight), *self._bias(layer)], transB=1)

    def _transposed(
        self, node: Node, x: str, layer: QuantizedLayer, weight: QuantizedTensor
    ) -> str:
        """Write the sub-pixel form; its phases are put in order once the result is codes."""
        zero = 0 if weight.zero_points is None else int(weight.zero_points)
        form = sub_pixel(node, weight.codes, zero)
        scales, axis = weight.scales, None
        if weight.axis is not None:
            scales, axis = scales.repeat(form.groups).repeat_interleave(form.phases), 0
        codes = QuantizedTensor(form.codes, scales, weight.zero_points, weight.bits, axis=axis)
        self._finish[node] = lambda result: self._interleave(node, result, form)
        inputs = [x, self._weight(codes), *self._bias(layer, form.phases)]
        return self.emit("Conv", inputs, pads=form.padding * 2, group=form.groups)

    def _interleave(self, node: Node, codes: str, form: SubPixel) -> str:
        """Turn `[batch, out * phases, ...]` into the transposed convolution's result."""
        axes, channels = len(form.strides), int(node.meta["val"].shape[1])
        full = [tap * stride for tap, stride in zip(form.lengths, form.strides, strict=True)]
        if form.phases > 1:
            split = self.constant([-1, channels, *form.strides, *form.lengths], torch.int64)
            pairs = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
            codes = self.emit("Reshape", [codes, split])
            codes = self.emit("Transpose", [codes], perm=[0, 1, *pairs])
            codes = self.emit("Reshape", [codes, self.constant([-1, channels, *full], torch.int64)])
        if form.starts == [0] * axes and form.ends == full:
            return codes
        parts = [form.starts, form.ends, list(range(2, 2 + axes))]
        return self.emit("Slice", [codes, *(self.constant(part, torch.int64) for part in parts)])

    def _weight(self, weight: QuantizedTensor) -> str:
        dtype = weight.codes.dtype
        zeros = weight.zero_points
        if zeros is None:
            zeros = torch.zeros_like(weight.scales)
        inputs = [
            self.constant(weight.codes, dtype),
            self.constant(weight.scales, torch.float32),
            self.constant(zeros, dtype),
        ]
        axis = {} if weight.axis is None else {"axis": weight.axis}
        return self.emit("DequantizeLinear", inputs, **axis)

    def _bias(self, layer: QuantizedLayer, phases: int = 1) -> list[str]:
        """Return the dequantized int32 bias, repeated for each phase; nothing without one."""
        if layer.bias is None or layer.bias_scales is None:
            return []
        scales, axis = layer.bias_scales, {}
        if scales.ndim:
            scales, axis = scales.repeat_interleave(phases), {"axis": 0}
        codes = self.constant(layer.bias.repeat_interleave(phases), torch.int32)
        inputs = [codes, self.constant(scales, torch.float32)]
        return [self.emit("DequantizeLinear", inputs, **axis)]

    def _embedding(self, indices: str, weight: QuantizedTensor) -> str:
        """Look up codes and scales: a dequantized table would be a float table in memory."""
        rows = self.emit("Gather", [self.constant(weight.codes, weight.codes.dtype), indices])
        values = self.emit("Cast", [rows], to=TensorProto.FLOAT)
        if weight.zero_points is not None:
            zeros = self._per_row(weight.zero_points.float(), indices)
            values = self.emit("Sub", [values, zeros])
        return self.emit("Mul", [values, self._per_row(weight.scales, indices)])

    def _per_row(self, table: Tensor, indices: str) -> str:
        if table.ndim == 0:
            return self.constant(table, torch.float32)
        return self.emit("Gather", [self.constant(table[:, None], torch.float32), indices])


def _declared(node: Node, name: str) -> onnx.ValueInfoProto:
    """Declare an input or output: sizes that depend on the batch are called `batch`."""
    value = node.meta["val"]
    sizes = [size if isinstance(size, int) else "batch" for size in value.shape]
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[value.dtype], sizes)
