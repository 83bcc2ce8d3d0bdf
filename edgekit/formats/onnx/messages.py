"""From the messages of onnx/onnx.proto to the classes of `onnx_model`; weights are stepped over."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from edgekit.formats.onnx.model import Attribute, Dim, Graph, Node, Tensor, UnsoundModel, Value
from edgekit.formats.onnx.protobuf import BYTES, Field, Message, ProtobufError, integer

# Name and bits of an element by its number in TensorProto.DataType.
DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
MAX_DIMS = 8
MAX_DIM = 1 << 40
_MAX_LIST = 4096
_MAX_DEPTH = 4
_EXTERNAL = 1  # TensorProto.DataLocation
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)
# TensorProto's lists of values spelled one by one: the bytes of each, None where they vary.
_SPELLED: dict[int, int | None] = {4: 4, 5: None, 6: None, 7: None, 10: 8, 11: None}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Parts:
    """What a model's message says; the names are those of `OnnxFile`."""

    ir_version: int
    producer: str
    opsets: dict[str, int]
    metadata: dict[str, str]
    graph: Graph


def read_model(message: Message) -> Parts:
    """Read a ModelProto."""
    found = _Fields(message, single={1, 2, 3, 4, 5, 6, 7})
    # Local functions may call one another, so that a small file grows without end.
    for number, what in ((20, "training information"), (25, "local functions")):
        if number in found.by_number:
            raise UnsoundModel(f"holds {what}, which is not supported")
    graph = found.message(7)
    opsets = dict(found.each(8, _opset))
    if graph is None or not opsets:
        raise ProtobufError("it has no graph or names no operator set")
    return Parts(
        ir_version=found.integer(1),
        producer=f"{found.text(2)} {found.text(3)}".strip(),
        opsets=opsets,
        metadata=dict(found.each(14, _entry)),
        graph=_graph(graph, _MAX_DEPTH),
    )


class _Fields:
    """The fields of a message by their number.

    A field that may stand there once must: readers disagree on what a second one means.
    """

    def __init__(self, message: Message, single: set[int]) -> None:
        self._message = message
        self.by_number: dict[int, list[Field]] = {}
        for field in message:
            self.by_number.setdefault(field.number, []).append(field)
        for number in single & self.by_number.keys():
            if len(self.by_number[number]) > 1:
                raise ProtobufError(f"field {number} of the message at {message.start} is repeated")

    def get(self, number: int) -> list[Field]:
        return self.by_number.get(number, [])

    def each(self, number: int, read: Callable[[Message], _T]) -> tuple[_T, ...]:
        return tuple(read(self._message.sub(field)) for field in self.get(number))

    def message(self, number: int) -> Message | None:
        return next((self._message.sub(field) for field in self.get(number)), None)

    def texts(self, number: int) -> tuple[str, ...]:
        return tuple(self._message.text(field) for field in self.get(number))

    def text(self, number: int) -> str:
        return next(iter(self.texts(number)), "")

    def integer(self, number: int) -> int:
        return next((integer(field) for field in self.get(number)), 0)

    def packed(self, field: Field, width: int | None) -> int:
        return self._message.packed(field, width)

    def integers(self, number: int, most: int) -> tuple[int, ...]:
        found: list[int] = []
        for field in self.get(number):
            found += self._message.integers(field, most)
            if len(found) > most:
                raise ProtobufError(f"field {number} holds more than {most} numbers")
        return tuple(found)


def _opset(message: Message) -> tuple[str, int]:
    found = _Fields(message, single={1, 2})
    return found.text(1), found.integer(2)


def _entry(message: Message) -> tuple[str, str]:
    found = _Fields(message, single={1, 2})
    return found.text(1), found.text(2)


def _graph(message: Message, depth: int) -> Graph:
    if depth < 0:
        raise UnsoundModel(f"its graphs are nested more than {_MAX_DEPTH} deep")
    found = _Fields(message, single={2, 10})
    if found.get(15):
        raise UnsoundModel("holds sparse tensors, which are not supported")
    return Graph(
        nodes=found.each(1, lambda node: _node(node, depth)),
        initializers=found.each(5, _tensor),
        inputs=found.each(11, _value),
        outputs=found.each(12, _value),
    )


def _node(message: Message, depth: int) -> Node:
    found = _Fields(message, single={3, 4, 6, 7, 8})
    attributes: dict[str, Attribute] = {}
    tensors: list[Tensor] = []
    graphs: list[Graph] = []
    for part in found.get(5):
        attribute = _Fields(message.sub(part), single={1, 2, 3, 4, 5, 6, 14, 20, 21, 22})
        if attribute.get(22) or attribute.get(23):
            raise UnsoundModel("holds sparse tensors, which are not supported")
        name = attribute.text(1)
        if name in attributes:
            raise UnsoundModel(f"attribute {name!r:.60} of {found.text(4)!r:.60} is repeated")
        attributes[name] = _plain(attribute, message)
        tensors += [*attribute.each(5, _tensor), *attribute.each(10, _tensor)]
        for number in (6, 11):
            graphs += attribute.each(number, lambda graph: _graph(graph, depth - 1))
    return Node(
        domain=found.text(7),
        op_type=found.text(4),
        name=found.text(3),
        inputs=found.texts(1),
        outputs=found.texts(2),
        attributes=attributes,
        tensors=tuple(tensors),
        graphs=tuple(graphs),
    )


def _plain(attribute: _Fields, message: Message) -> Attribute:
    """Return an attribute's value where it is a number, a short text or a short list of integers.

    The type says which field counts (AttributeProto.AttributeType): a zero may be left out.
    """
    kind = attribute.integer(20)
    if kind == 1:
        return next((message.float32(field) for field in attribute.get(2)), 0.0)
    if kind == 2:
        return attribute.integer(3)
    if kind == 3:
        text = attribute.get(4)
        return message.loose_text(text[0], _MAX_LIST) if text else ""
    if kind == 7 and sum(field.end - field.start or 1 for field in attribute.get(8)) <= _MAX_LIST:
        return attribute.integers(8, _MAX_LIST)
    return None


def _value(message: Message) -> Value:
    found = _Fields(message, single={1, 2, 3})
    name, type_message = found.text(1), found.message(2)
    if type_message is None:
        return Value(name, None, None)
    tensor = _Fields(type_message, single={1, 4, 5, 6, 8, 9}).message(1)
    if tensor is None:
        return Value(name, None, None)
    facts = _Fields(tensor, single={1, 2})
    shape = facts.message(2)
    dtype = _dtype(facts.integer(1), name)[0]
    return Value(name, dtype, None if shape is None else _Fields(shape, single=set()).each(1, _dim))


def _dim(message: Message) -> Dim:
    found = _Fields(message, single={1, 2, 3})
    if found.get(1):
        return _checked_dim(found.integer(1))
    return found.text(2) or None


def _checked_dim(size: int) -> int:
    if not 0 <= size <= MAX_DIM:
        raise UnsoundModel(f"holds a dimension of {size}")
    return size


def _dtype(number: int, name: str) -> tuple[str, int]:
    if number not in DTYPES:
        raise UnsoundModel(f"{name!r:.60} has the unknown type {number}")
    return DTYPES[number]


def _tensor(message: Message) -> Tensor:
    """Read a TensorProto; what it says of its size must be what it holds."""
    found = _Fields(message, single={2, 3, 8, 9, 12, 14})
    name = found.text(8)
    dtype, bits = _dtype(found.integer(2), name)
    shape = tuple(_checked_dim(size) for size in found.integers(1, MAX_DIMS))
    count = prod(shape)
    size = (count * bits + 7) // 8
    raw = found.get(9)
    spelled = [number for number in _SPELLED if found.get(number)]
    if found.get(3) or len(raw) + len(spelled) > 1:
        raise UnsoundModel(f"tensor {name!r:.60} holds its values in two ways or in segments")
    if found.integer(14) == _EXTERNAL:
        if raw or spelled:
            raise UnsoundModel(f"tensor {name!r:.60} is external and holds values, too")
        location, offset = _external(name, size, found.each(13, _entry))
        return Tensor(name, dtype, shape, size, location, offset)
    if raw:
        start, end = raw[0].start, raw[0].end
        if raw[0].wire != BYTES or end - start != size or dtype == "string":
            raise UnsoundModel(
                f"tensor {name!r:.60} of {size} bytes by its shape holds {end - start}"
            )
        return Tensor(name, dtype, shape, size, None, start)
    _check_spelled(found, name, dtype, count)
    return Tensor(name, dtype, shape, size, None, None)


def _check_spelled(found: _Fields, name: str, dtype: str, count: int) -> None:
    """Compare the number of values that are spelled one by one with the shape."""
    held = sum(
        1 if field.wire != BYTES or number == 6 else found.packed(field, width)
        for number, width in _SPELLED.items()
        for field in found.get(number)
    )
    bits = next(bits for known, bits in DTYPES.values() if known == dtype)
    expected = (count * bits + 7) // 8 if 0 < bits < 8 else count  # small ones share an int32
    if held != expected:
        raise UnsoundModel(f"tensor {name!r:.60} of {expected} values by its shape holds {held}")


def _external(name: str, size: int, entries: tuple[tuple[str, str], ...]) -> tuple[str, int]:
    """Return file and offset; whether the file has those bytes is checked where it lies."""
    facts = dict(entries)
    if len(facts) != len(entries) or not facts.keys() <= {"location", "offset", "length"}:
        raise UnsoundModel(f"tensor {name!r:.60} has unknown or repeated external entries")
    offset, length = facts.get("offset", "0"), facts.get("length", str(size))
    if not _NUMBER.fullmatch(offset) or not _NUMBER.fullmatch(length):
        raise UnsoundModel(f"tensor {name!r:.60} has an offset or length that is no number")
    if int(length) != size:
        raise UnsoundModel(f"tensor {name!r:.60} of {size} bytes by its shape states {length}")
    return facts.get("location", ""), int(offset)
