"""What a `.pte` says of itself: methods, operators, delegates and where each constant lies.

Schema: executorch/exir/_serialize/program.fbs (`ET12`). Only the program is read, a small part of
the file; weights are read span by span by whoever wants them. Any file is safe to open.
"""

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgekit.errors import EdgekitError
from edgekit.formats.pte.flatbuffer import Flatbuffer, FlatbufferError, Table
from edgekit.formats.pte.header import PteHeader

_T = TypeVar("_T")

FORWARD = "forward"
Value = int | bool | float | str | None | list[int]

# The types of schema/scalar_type.fbs that constants have: name, bytes of an element.
SCALAR_TYPES = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("float16", 2),
    6: ("float32", 4),
    7: ("float64", 8),
    11: ("bool", 1),
    15: ("bfloat16", 2),
}
# Slots of program.fbs: of Program, of ExecutionPlan, of Tensor, and of NamedData.
PLANS, INLINE_BLOBS, SEGMENTS, CONSTANT_SEGMENT, NAMED_DATA = 1, 3, 4, 5, 7
_NAME, _CONTAINER, _VALUES, _OUTPUTS = 0, 1, 2, 4
_CHAINS, _OPERATORS, _DELEGATES, _PLANNED = 5, 6, 7, 8
_SCALAR_TYPE, _SIZES, _DATA_BUFFER, _ALLOCATION = 0, 2, 5, 6
KEY, SEGMENT_INDEX = 0, 1
_MAX_PROGRAM_BYTES = 256 << 20
_NULL, _INT, _BOOL, _DOUBLE, _TENSOR, _STRING = 1, 2, 3, 4, 5, 6  # union KernelTypes
_KERNEL_CALL, _DELEGATE_CALL = 1, 2  # union InstructionArguments
_SEGMENT = 1  # enum DataLocation


@dataclass(frozen=True)
class Span:
    """A run of bytes of the file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Constant:
    """A tensor that the program holds outside its delegates."""

    dtype: str
    shape: tuple[int, ...]
    span: Span


@dataclass(frozen=True)
class KernelCall:
    """One call of an operator outside the delegates; None for an argument that is no constant."""

    operator: str
    arguments: tuple[Constant | None, ...]


@dataclass(frozen=True)
class Delegate:
    """One part of the graph that a backend runs, and its compiled form."""

    backend: str
    blob: Span


@dataclass(frozen=True)
class Method:
    """One method: what it runs in order of its instructions, and what it needs.

    `constants` include those that delegates take as inputs; `delegate_calls` are indices of
    `delegates`; `planned_bytes` is the memory that its intermediate tensors and state share;
    `output` the value of a constant method, else None.
    """

    name: str
    constants: tuple[Constant, ...]
    kernel_calls: tuple[KernelCall, ...]
    delegates: tuple[Delegate, ...]
    delegate_calls: tuple[int, ...]
    planned_bytes: int
    output: Value

    @property
    def operators(self) -> dict[str, int]:
        """Operators outside the delegates with the number of their calls, most frequent first."""
        return dict(Counter(call.operator for call in self.kernel_calls).most_common())


@dataclass(frozen=True)
class Program:
    """A parsed `.pte`.

    `program` is the FlatBuffer with its header, `named` the data that delegates ask for by key.
    """

    path: Path
    file_bytes: int
    program: Span
    methods: dict[str, Method]
    named: dict[str, Span]

    @classmethod
    def open(cls, path: Path) -> "Program":
        """Parse the program; EdgekitError where the file is not a whole and sound `.pte`."""
        header = PteHeader.read(path)
        size = header.program_bytes
        if size > _MAX_PROGRAM_BYTES:
            raise EdgekitError(f"{path}: is damaged: its program cannot have {size} bytes")
        try:
            with path.open("rb") as file:
                data = file.read(size)
            return _Parser(path, header, data).parse()
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
        except (FlatbufferError, struct.error, OverflowError) as error:
            raise EdgekitError(f"{path}: is damaged: {error}") from error

    @property
    def constant_methods(self) -> dict[str, Value]:
        """Values of the methods that only return one: what runners read about the model."""
        return {name: method.output for name, method in self.methods.items() if name != FORWARD}

    def read(self, span: Span) -> bytes:
        """Return the bytes of a span."""
        with self.path.open("rb") as file:
            file.seek(span.offset)
            return file.read(span.size)


class _Parser:
    """Walks the tables of one file."""

    def __init__(self, path: Path, header: PteHeader, data: bytes) -> None:
        self._path, self._header = path, header
        self._root = Flatbuffer(data).root(b"ET12")
        self._inline = [table.bytes_span(0) for table in self._root.tables(INLINE_BLOBS)]
        self._segments = [
            self._checked(header.segment_base + segment.number(0, "Q"), segment.number(1, "Q"))
            for segment in self._root.tables(SEGMENTS)
        ]
        self._offsets: tuple[int, ...] = ()
        constants = self._root.table(CONSTANT_SEGMENT)
        if constants is not None:
            self._offsets = constants.numbers(1, "Q")
        if constants is not None and self._offsets:
            self._constants = self._segment(constants.number(0, "I"))

    def parse(self) -> Program:
        methods = [self._method(plan) for plan in self._root.tables(PLANS)]
        named = {
            entry.text(KEY): self._segment(entry.number(SEGMENT_INDEX, "I"))
            for entry in self._root.tables(NAMED_DATA)
        }
        return Program(
            self._path,
            self._header.file_bytes,
            Span(0, self._header.program_bytes),
            {method.name: method for method in methods},
            named,
        )

    def _method(self, plan: Table) -> Method:
        values = plan.tables(_VALUES)
        operators = [_dotted(table.text(0), table.text(1)) for table in plan.tables(_OPERATORS)]
        delegates = tuple(self._delegate(table) for table in plan.tables(_DELEGATES))
        kernels, delegated = list[KernelCall](), list[int]()
        constants = [self._constant(value) for value in values]
        for kind, call in _calls(plan):
            if kind == _KERNEL_CALL:
                arguments = tuple(_item(constants, at) for at in call.numbers(1, "i"))
                kernels.append(KernelCall(_item(operators, call.number(0, "i")), arguments))
            elif kind == _DELEGATE_CALL:
                index = call.number(0, "i")
                _item(delegates, index)
                delegated.append(index)
        return Method(
            plan.text(_NAME),
            tuple(constant for constant in constants if constant is not None),
            tuple(kernels),
            delegates,
            tuple(delegated),
            sum(plan.numbers(_PLANNED, "q")),
            None if kernels or delegated else _output(plan, values),
        )

    def _delegate(self, table: Table) -> Delegate:
        place = table.table(1)
        if place is None:
            raise FlatbufferError("a delegate has no data")
        index = place.number(1, "I")
        inline = place.number(0, "b") != _SEGMENT
        blob = Span(*_item(self._inline, index)) if inline else self._segment(index)
        return Delegate(table.text(0), blob)

    def _constant(self, value: Table) -> Constant | None:
        """Return a tensor with data in the constant segment: buffer 0 and planned ones lack it."""
        tensor = value.table(1) if value.number(0, "B") == _TENSOR else None
        if tensor is None or tensor.table(_ALLOCATION) is not None:
            return None
        index = tensor.number(_DATA_BUFFER, "I")
        if index == 0 or not self._offsets:
            return None
        kind = SCALAR_TYPES.get(tensor.number(_SCALAR_TYPE, "b"))
        if kind is None:
            raise FlatbufferError(
                f"a constant has the unknown type {tensor.number(_SCALAR_TYPE, 'b')}"
            )
        shape = tensor.numbers(_SIZES, "i")
        if any(extent < 0 for extent in shape) or len(shape) > 16:
            raise FlatbufferError("a constant has an impossible shape")
        size = math.prod(shape) * kind[1]
        offset = _item(self._offsets, index)
        if offset + size > self._constants.size:
            raise FlatbufferError("a constant reaches beyond the constant segment")
        return Constant(kind[0], shape, Span(self._constants.offset + offset, size))

    def _segment(self, index: int) -> Span:
        return _item(self._segments, index)

    def _checked(self, offset: int, size: int) -> Span:
        end = offset + size
        if end > self._header.file_bytes:
            raise FlatbufferError(f"a segment ends at byte {end} of {self._header.file_bytes}")
        return Span(offset, size)


def _calls(plan: Table) -> list[tuple[int, Table]]:
    found = []
    for chain in plan.tables(_CHAINS):
        for instruction in chain.tables(2):
            call = instruction.table(1)
            if call is not None:
                found.append((instruction.number(0, "B"), call))
    return found


def _output(plan: Table, values: Sequence[Table]) -> Value:
    """Return what a method without instructions returns; only a list comes as several values."""
    results = [_plain(_item(values, index)) for index in plan.numbers(_OUTPUTS, "i")]
    container = plan.table(_CONTAINER)
    if container is not None and '"builtins.list"' in container.text(1):
        return [int(value) for value in results if isinstance(value, int)]
    return results[0] if len(results) == 1 else None


def _plain(value: Table) -> int | bool | float | str | None:
    kind, inner = value.number(0, "B"), value.table(1)
    if inner is None or kind == _NULL:
        return None
    if kind == _INT:
        return inner.number(0, "q")
    if kind == _BOOL:
        return bool(inner.number(0, "B"))
    if kind == _DOUBLE:
        return float(inner.number(0, "d"))
    return inner.text(0) if kind == _STRING else None


def _dotted(name: str, overload: str) -> str:
    return f"{name}.{overload}" if overload else name


def _item(items: Sequence[_T], index: int) -> _T:
    if not 0 <= index < len(items):
        raise FlatbufferError(f"index {index} of {len(items)} items")
    return items[index]
