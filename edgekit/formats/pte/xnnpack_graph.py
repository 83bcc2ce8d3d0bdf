"""What an XNNPACK delegate's blob holds: its nodes and its constants.

Layout and schema: executorch/backends/xnnpack/serialization (`XNNHeader`, schema.fbs).
"""

import struct
from dataclasses import dataclass

from edgekit.errors import EdgekitError
from edgekit.formats.pte.flatbuffer import Flatbuffer, FlatbufferError, Table
from edgekit.formats.pte.program import Delegate, Program, Span

BACKEND = "XnnpackBackend"
FULLY_CONNECTED = "FullyConnected"

# enum XNNDatatype
_DATATYPES = (
    "invalid",
    "fp32",
    "fp16",
    "qint8",
    "quint8",
    "qint32",
    "qcint8",
    "qcint32",
    "qcint4",
    "qdint8",
    "qbint4",
    "qpint8",
    "int32",
    "pfp32",
    "bf16",
)
# union XNodeUnion, from 1
_NODES = (
    "Add",
    "FullyConnected",
    "Softmax",
    "Sigmoid",
    "StaticTranspose",
    "Clamp",
    "Conv2d",
    "Div",
    "StaticResizeBilinear2D",
    "StaticConstantPad",
    "AvgPooling2d",
    "Minimum",
    "DepthwiseConv2d",
    "MaxPooling2d",
    "Multiply",
    "Subtract",
    "Floor",
    "Convert",
    "GlobalAvgPooling2d",
    "StaticReshape",
    "ArgMaxPooling2d",
    "SquareRoot",
    "Ceiling",
    "Hardswish",
    "LeakyReLU",
    "Maximum",
    "Negate",
    "Square",
    "ELU",
    "Abs",
    "PReLU",
    "Concatenate2",
    "Concatenate3",
    "Concatenate4",
    "StaticSlice",
    "ScaledDotProductAttention",
    "BatchMatrixMultiply",
    "Concatenate5",
    "ConvTranspose2d",
    "ReciprocalSquareRoot",
    "Log",
    "Gelu",
    "Tanh",
    "Exp",
    "Sin",
    "Copy",
    "Cos",
)
# Where each keeps its output_id, by the tables of schema.fbs.
_PAIR, _SINGLE, _CONVOLUTION, _POOLING, _CONCATENATION = 2, 1, 18, 11, 5
_OUTPUT_SLOT = {
    **dict.fromkeys(("Add", "Div", "Minimum", "Multiply", "Subtract", "Maximum", "PReLU"), _PAIR),
    **dict.fromkeys(("BatchMatrixMultiply", "LeakyReLU", "ELU"), _PAIR),
    **dict.fromkeys(("Conv2d", "DepthwiseConv2d", "ConvTranspose2d"), _CONVOLUTION),
    **dict.fromkeys(("AvgPooling2d", "MaxPooling2d"), _POOLING),
    **dict.fromkeys([f"Concatenate{count}" for count in (2, 3, 4, 5)], _CONCATENATION),
    **dict.fromkeys(("FullyConnected", "StaticTranspose", "StaticResizeBilinear2D"), 3),
    "StaticReshape": 3,
    "StaticConstantPad": 4,
    "StaticSlice": 4,
    "ScaledDotProductAttention": 5,
    "ArgMaxPooling2d": 7,
}
_HEADER_BYTES = 30
_QUANTIZED_VALUE = 2  # union XValueUnion
_PER_CHANNEL, _PER_GROUP = 1, 4  # union XNNQuantParams
_SCALE_SLOT = {_PER_CHANNEL: 2, _PER_GROUP: 4}  # where each keeps scale_buffer_idx


@dataclass(frozen=True)
class GraphConstant:
    """A constant of a graph.

    `datatype` is XNNPACK's name: qcint8 and qcint4 have fp32 `scales` per channel, qbint4 bf16
    `scales` per group of `group_size`; 4-bit codes are stored plus 8, the first in the low half.
    """

    datatype: str
    shape: tuple[int, ...]
    data: Span
    scales: Span | None
    group_size: int | None
    is_filter: bool
    """Whether a fully connected node multiplies by it."""


@dataclass(frozen=True)
class Graph:
    """One delegate's graph; `results` are the datatypes of the nodes' results, in order."""

    nodes: tuple[str, ...]
    results: tuple[str, ...]
    constants: tuple[GraphConstant, ...]


def read_graph(program: Program, delegate: Delegate) -> Graph:
    """Parse one delegate; EdgekitError where its blob is not sound."""
    try:
        return _parse(program, delegate)
    except (FlatbufferError, struct.error, OverflowError) as error:
        raise EdgekitError(f"{program.path}: an XNNPACK delegate is damaged: {error}") from error


def _parse(program: Program, delegate: Delegate) -> Graph:
    blob = delegate.blob
    header = program.read(Span(blob.offset, min(blob.size, _HEADER_BYTES)))
    if header[4:8] != b"XH00" or len(header) < _HEADER_BYTES:
        raise FlatbufferError("no XH00 mark")
    start, size, data = struct.unpack_from("<III", header, 10)
    if start + size > blob.size:
        raise FlatbufferError("its graph reaches beyond its blob")
    root = Flatbuffer(program.read(Span(blob.offset + start, size))).root(b"XN01")
    spans = [_span(program, delegate, data, entry) for entry in root.tables(8)]
    datatypes = dict(map(_datatype, root.tables(2)))
    nodes, results, filters = list[str](), list[str](), set[int]()
    for node in root.tables(1):
        kind = node.number(0, "B")
        if not 1 <= kind <= len(_NODES):
            raise FlatbufferError(f"unknown node {kind}")
        nodes.append(_NODES[kind - 1])
        operator = node.table(1)
        if operator is None:
            raise FlatbufferError(f"a node {nodes[-1]} is empty")
        if nodes[-1] == FULLY_CONNECTED:
            filters.add(operator.number(1, "I"))
        result = operator.number(_OUTPUT_SLOT.get(nodes[-1], _SINGLE), "I")
        if result not in datatypes:
            raise FlatbufferError(f"a node {nodes[-1]} gives no value")
        results.append(datatypes[result])
    constants = (_constant(value, spans, filters) for value in root.tables(2))
    found = tuple(constant for constant in constants if constant is not None)
    return Graph(tuple(nodes), tuple(results), found)


def _span(program: Program, delegate: Delegate, base: int, entry: Table) -> Span:
    """Return where a constant lies: among the named data, or behind the graph in its blob."""
    key = entry.text(2)
    if key:
        if key not in program.named:
            raise FlatbufferError(f"its constant {key[:80]!r} is not in the file")
        return program.named[key]
    offset, size = base + entry.number(0, "Q"), entry.number(1, "Q")
    if not size:  # entry 0 stands for "no constant"
        return Span(delegate.blob.offset, 0)
    if offset + size > delegate.blob.size:
        raise FlatbufferError("a constant reaches beyond its blob")
    return Span(delegate.blob.offset + offset, size)


def _tensor(value: Table) -> tuple[Table, Table, bool]:
    """Return a value's table, the tensor in it, and whether it is quantized."""
    outer = value.table(1)
    quantized = value.number(0, "B") == _QUANTIZED_VALUE
    tensor = outer.table(0) if outer is not None and quantized else outer
    if outer is None or tensor is None:
        raise FlatbufferError("a value is empty")
    return outer, tensor, quantized


def _datatype(value: Table) -> tuple[int, str]:
    """Return a value's id and XNNPACK's name of its type."""
    _, tensor, _ = _tensor(value)
    datatype = tensor.number(0, "h")
    if not 0 <= datatype < len(_DATATYPES):
        raise FlatbufferError(f"unknown datatype {datatype}")
    return tensor.number(6, "I"), _DATATYPES[datatype]


def _constant(value: Table, spans: list[Span], filters: set[int]) -> GraphConstant | None:
    outer, tensor, quantized = _tensor(value)
    index = tensor.number(3, "I")
    if index == 0:
        return None
    scales, group_size = _scales(outer, spans) if quantized else (None, None)
    return GraphConstant(
        _datatype(value)[1],
        tensor.numbers(2, "I"),
        _at(spans, index),
        scales,
        group_size,
        tensor.number(6, "I") in filters,
    )


def _scales(value: Table, spans: list[Span]) -> tuple[Span | None, int | None]:
    kind, parameters = value.number(1, "B"), value.table(2)
    if parameters is None or kind not in _SCALE_SLOT:
        return None, None
    group_size = parameters.number(2, "i") if kind == _PER_GROUP else None
    return _at(spans, parameters.number(_SCALE_SLOT[kind], "I")), group_size


def _at(spans: list[Span], index: int) -> Span:
    if index >= len(spans):
        raise FlatbufferError(f"constant {index} of {len(spans)}")
    return spans[index]
