"""ONNX nodes of the float operators that a traced module may hold beside its quantized layers."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from onnx import TensorProto
from torch import Tensor
from torch.fx import Node

from edgekit.errors import EdgekitError
from edgekit.quantize.traced.operators import arguments, aten, numbers, operator_name, rank
from edgekit.quantize.traced.trace import at

ELEMENT_TYPES: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
"""What inputs and outputs may be."""
Attribute = int | float | str | list[int]
Constant = Tensor | float | list[int]


class Writer(Protocol):
    """What a translation writes with."""

    def emit(self, operator: str, inputs: list[str], **attributes: Attribute) -> str:
        """Add a node with one output; return the output's name."""
        ...

    def constant(self, value: Constant, dtype: torch.dtype) -> str:
        """Add an initializer; return its name."""
        ...

    def size(self, node: Node | int) -> str:
        """Return the name of a size as an int64 scalar, also of one that varies with the batch."""
        ...


Translation = Callable[[Writer, Node, list[str]], str]
"""`translation(writer, node, names)`: names of the operands in order; returns the result's."""


def translate(writer: Writer, node: Node, names: list[str]) -> str:
    """Add what computes a node; EdgekitError for an operator that has no translation here."""
    found = TRANSLATIONS.get(node.target)
    if found is None:
        raise EdgekitError(f"target onnx has no form of {operator_name(node)}{at(node)}")
    return found(writer, node, names)


def operands(node: Node) -> list[Node]:
    """Return the tensors that an operator takes, in order, each as often as it is taken."""
    found: list[Node] = []
    for item in [*node.args, *node.kwargs.values()]:
        group = item if isinstance(item, list | tuple) else [item]
        found += [part for part in group if isinstance(part, Node) and _is_tensor(part)]
    return found


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _plain(operator: str, **attributes: Attribute) -> Translation:
    return lambda writer, node, names: writer.emit(operator, names, **attributes)


def _pair(operator: str) -> Translation:
    def translation(writer: Writer, node: Node, names: list[str]) -> str:
        dtype = node.meta["val"].dtype
        rest = iter(names)
        operands = [
            _as_type(writer, item, next(rest), dtype)
            if isinstance(item, Node)
            else writer.constant(item, dtype)
            for item in list(arguments(node).values())[:2]
        ]
        if arguments(node).get("alpha", 1) != 1:
            alpha = writer.constant(arguments(node)["alpha"], dtype)
            operands[1] = writer.emit("Mul", [operands[1], alpha])
        return writer.emit(operator, operands)

    return translation


def _as_type(writer: Writer, node: Node, name: str, dtype: torch.dtype) -> str:
    """Convert an operand to the type of the result, as torch promotes and ONNX does not."""
    if node.meta["val"].dtype == dtype:
        return name
    return writer.emit("Cast", [name], to=_element_type(node, dtype))


def _element_type(node: Node, dtype: torch.dtype) -> int:
    if dtype not in ELEMENT_TYPES:
        raise EdgekitError(f"target onnx has no form of {dtype}{at(node)}")
    return int(ELEMENT_TYPES[dtype])


def _convert(writer: Writer, node: Node, names: list[str]) -> str:
    dtype = node.meta["val"].dtype
    return writer.emit("Cast", names, to=_element_type(node, dtype))


def _where(writer: Writer, node: Node, names: list[str]) -> str:
    dtype = node.meta["val"].dtype
    condition, *values = names
    pair = zip(operands(node)[1:], values, strict=True)
    return writer.emit(
        "Where", [condition, *(_as_type(writer, item, name, dtype) for item, name in pair)]
    )


def _not(writer: Writer, node: Node, names: list[str]) -> str:
    if node.all_input_nodes[0].meta["val"].dtype == torch.bool:
        return writer.emit("Not", names)
    if node.target == aten.bitwise_not.default:
        return writer.emit("BitwiseNot", names)
    zero = writer.constant(0, node.all_input_nodes[0].meta["val"].dtype)
    return writer.emit("Equal", [*names, zero])


def _masked_fill(writer: Writer, node: Node, names: list[str]) -> str:
    value = writer.constant(arguments(node)["value"], node.meta["val"].dtype)
    return writer.emit("Where", [names[1], value, names[0]])


def _hardtanh(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    ends = [writer.constant(found[key], torch.float32) for key in ("min_val", "max_val")]
    return writer.emit("Clip", [*names, *ends])


def _silu(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Mul", [names[0], writer.emit("Sigmoid", names)])


def _gelu(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Gelu", names, approximate=arguments(node)["approximate"])


def _elu(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    if (found["scale"], found["input_scale"]) != (1, 1):
        raise EdgekitError(f"target onnx has no form of a scaled elu{at(node)}")
    return writer.emit("Elu", names, alpha=float(found["alpha"]))


def _leaky_relu(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("LeakyRelu", names, alpha=float(arguments(node)["negative_slope"]))


def _softmax(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Softmax", names, axis=int(arguments(node)["dim"]))


def _layer_norm(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    if found["weight"] is None:
        raise EdgekitError(f"target onnx takes layer norms with weights only{at(node)}")
    axis = -len(found["normalized_shape"])
    return writer.emit("LayerNormalization", names, axis=axis, epsilon=float(found["eps"]))


def _reshape(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Reshape", [*names, writer.constant(onnx_sizes(node), torch.int64)])


def onnx_sizes(node: Node) -> list[int]:
    """Return the sizes of a node's tensor; one that depends on the batch is -1, once."""
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) > 1:
        raise EdgekitError(f"target onnx: {operator_name(node)} has two sizes that vary{at(node)}")
    return sizes


def _expand(writer: Writer, node: Node, names: list[str]) -> str:
    sizes = [1 if size == -1 else size for size in arguments(node)["size"]]  # 1 leaves an axis
    if all(isinstance(size, int) for size in sizes):
        return writer.emit("Expand", [*names, writer.constant(sizes, torch.int64)])
    axis = writer.constant([0], torch.int64)
    parts = [writer.emit("Unsqueeze", [writer.size(size), axis]) for size in sizes]
    return writer.emit("Expand", [*names, writer.emit("Concat", parts, axis=0)])


def _permute(writer: Writer, node: Node, names: list[str]) -> str:
    order = [axis % rank(node) for axis in arguments(node)["dims"]]
    return writer.emit("Transpose", names, perm=order)


def _transpose(writer: Writer, node: Node, names: list[str]) -> str:
    order = list(range(rank(node)))
    a, b = arguments(node)["dim0"], arguments(node)["dim1"]
    order[a], order[b] = order[b], order[a]
    return writer.emit("Transpose", names, perm=order)


def _slice(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    start, end = found["start"] or 0, found["end"]
    end = torch.iinfo(torch.int64).max if end is None else end
    if not isinstance(start, int) or not isinstance(end, int):
        raise EdgekitError(f"target onnx takes slices of fixed ends only{at(node)}")
    parts = [start, end, found["dim"], found["step"]]
    return writer.emit("Slice", [*names, *(writer.constant([part], torch.int64) for part in parts)])


def _concat(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Concat", names, axis=int(arguments(node)["dim"]))


def _mean(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    axes = sorted(axis % rank(found["self"]) for axis in found["dim"])
    if found["keepdim"] and axes == list(range(2, rank(found["self"]))):
        return writer.emit("GlobalAveragePool", names)
    inputs = [*names, writer.constant(axes, torch.int64)]
    return writer.emit("ReduceMean", inputs, keepdims=int(found["keepdim"]))


def _adaptive_average(writer: Writer, node: Node, names: list[str]) -> str:
    operand = node.all_input_nodes[0]
    sizes = [int(size) for size in operand.meta["val"].shape[2:]]
    wanted = [int(size) for size in node.meta["val"].shape[2:]]
    if wanted == [1] * len(sizes):
        return writer.emit("GlobalAveragePool", names)
    if any(size % count for size, count in zip(sizes, wanted, strict=True)):
        raise EdgekitError(
            f"target onnx takes adaptive pooling to sizes that divide {sizes}, got "
            f"{wanted}{at(node)}"
        )
    kernel = [size // count for size, count in zip(sizes, wanted, strict=True)]
    return writer.emit("AveragePool", names, kernel_shape=kernel, strides=kernel)


def _pool(operator: str) -> Translation:
    def translation(writer: Writer, node: Node, names: list[str]) -> str:
        found = arguments(node)
        axes = rank(node) - 2
        kernel = numbers(found["kernel_size"], axes)
        attributes: dict[str, Attribute] = {
            "kernel_shape": kernel,
            "strides": numbers(found["stride"], axes) if found["stride"] else kernel,
            "pads": numbers(found["padding"], axes) * 2,
            "ceil_mode": int(found["ceil_mode"]),
        }
        if operator == "MaxPool":
            attributes["dilations"] = numbers(found["dilation"], axes)
        else:
            attributes["count_include_pad"] = int(found["count_include_pad"])
            if found.get("divisor_override") is not None:
                raise EdgekitError(f"target onnx has no divisor_override{at(node)}")
        return writer.emit(operator, names, **attributes)

    return translation


def _pad(writer: Writer, node: Node, names: list[str]) -> str:
    found = arguments(node)
    pads = onnx_pads(found["pad"], rank(node))
    value = writer.constant(float(found["value"]), torch.float32)
    return writer.emit("Pad", [*names, writer.constant(pads, torch.int64), value])


def onnx_pads(pad: list[int], axes: int) -> list[int]:
    """Turn torch's pads, last axis first and in pairs, into ONNX's: all starts, then all ends."""
    before, after = [0] * axes, [0] * axes
    for number in range(len(pad) // 2):
        before[axes - 1 - number], after[axes - 1 - number] = pad[2 * number : 2 * number + 2]
    return before + after


def _squeeze(operator: str) -> Translation:
    def translation(writer: Writer, node: Node, names: list[str]) -> str:
        axes = arguments(node)["dim"]
        axes = [axes] if isinstance(axes, int) else list(axes)
        return writer.emit(operator, [*names, writer.constant(axes, torch.int64)])

    return translation


def _convolution(operator: str) -> Translation:
    return lambda writer, node, names: writer.emit(operator, names, **convolution_attributes(node))


def convolution_attributes(node: Node) -> dict[str, Attribute]:
    """Return the attributes of ONNX's Conv and ConvTranspose."""
    found = arguments(node)
    axes = rank(found["weight"]) - 2
    attributes: dict[str, Attribute] = {
        "strides": numbers(found["stride"], axes),
        "pads": numbers(found["padding"], axes) * 2,
        "dilations": numbers(found["dilation"], axes),
        "group": int(found["groups"]),
    }
    if "output_padding" in found:
        attributes["output_padding"] = numbers(found["output_padding"], axes)
    return attributes


def _linear(writer: Writer, node: Node, names: list[str]) -> str:
    if rank(arguments(node)["input"]) == 2:
        return writer.emit("Gemm", names, transB=1)
    product = writer.emit("MatMul", [names[0], writer.emit("Transpose", [names[1]], perm=[1, 0])])
    return writer.emit("Add", [product, names[2]]) if len(names) > 2 else product


def _embedding(writer: Writer, node: Node, names: list[str]) -> str:
    return writer.emit("Gather", names, axis=0)


TRANSLATIONS: dict[Any, Translation] = {
    aten.relu.default: _plain("Relu"),
    aten.hardtanh.default: _hardtanh,
    aten.silu.default: _silu,
    aten.hardswish.default: _plain("HardSwish"),
    aten.sigmoid.default: _plain("Sigmoid"),
    aten.hardsigmoid.default: _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.tanh.default: _plain("Tanh"),
    aten.gelu.default: _gelu,
    aten.elu.default: _elu,
    aten.leaky_relu.default: _leaky_relu,
    aten.softmax.int: _softmax,
    aten.layer_norm.default: _layer_norm,
    aten.add.Tensor: _pair("Add"),
    aten.sub.Tensor: _pair("Sub"),
    aten.mul.Tensor: _pair("Mul"),
    aten.div.Tensor: _pair("Div"),
    aten._to_copy.default: _convert,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    aten.matmul.default: _plain("MatMul"),
    aten.reshape.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.squeeze.dim: _squeeze("Squeeze"),
    aten.squeeze.dims: _squeeze("Squeeze"),
    aten.unsqueeze.default: _squeeze("Unsqueeze"),
    aten.slice.Tensor: _slice,
    aten.cat.default: _concat,
    aten.mean.dim: _mean,
    aten.adaptive_avg_pool2d.default: _adaptive_average,
    aten.max_pool2d.default: _pool("MaxPool"),
    aten.avg_pool2d.default: _pool("AveragePool"),
    aten.constant_pad_nd.default: _pad,
    aten.conv1d.default: _convolution("Conv"),
    aten.conv2d.default: _convolution("Conv"),
    aten.conv_transpose1d.default: _convolution("ConvTranspose"),
    aten.conv_transpose2d.input: _convolution("ConvTranspose"),
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
}
