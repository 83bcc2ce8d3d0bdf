"""What an ONNX file is made of, read without its weights, from a file that nobody vouches for.

`OnnxFile.open` is the check before any C++ sees the file. Fields: onnx/onnx.proto.
"""

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.files import os_reason
from edgekit.protobuf import Buffer, ProtobufError

MAX_BYTES = (1 << 31) - 1
"""Where protocol buffers end; larger models keep their weights in another file."""

_MAX_FIELDS = 400_000  # a decoder has some ten thousand
_MAX_TEXT_BYTES = 64 << 20

Attribute = int | float | str | tuple[int, ...] | None
Dim = int | str | None


class UnsoundModel(ValueError):
    """The file is an ONNX model but not one that may be opened; says why."""


@dataclass(frozen=True)
class Tensor:
    """A constant of `stored_bytes` bytes, `offset` into `location`, None for the model's own file.

    `offset` is None where the file spells the values one by one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored_bytes: int
    location: str | None
    offset: int | None


@dataclass(frozen=True)
class Value:
    """An input or output; a dimension is a size, a symbol or None for a free one.

    `dtype` and `shape` are None for what is no tensor, `shape` also where none is stated.
    """

    name: str
    dtype: str | None
    shape: tuple[Dim, ...] | None


@dataclass(frozen=True)
class Node:
    """One call of an operator; an attribute of another kind than `Attribute` names is None."""

    domain: str
    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]
    tensors: tuple[Tensor, ...]
    graphs: tuple["Graph", ...]

    @property
    def operator(self) -> str:
        """`domain::type`; the type alone in ONNX's own domain."""
        own = self.domain in ("", "ai.onnx")
        return self.op_type if own else f"{self.domain}::{self.op_type}"


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run, constants, inputs and outputs."""

    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def all_nodes(self) -> Iterator[Node]:
        """Yield the nodes, each followed by those of its sub-graphs."""
        for node in self.nodes:
            yield node
            for graph in node.graphs:
                yield from graph.all_nodes()

    def all_tensors(self) -> Iterator[Tensor]:
        """Yield every constant, those of nodes and sub-graphs included."""
        yield from self.initializers
        for node in self.nodes:
            yield from node.tensors
            for graph in node.graphs:
                yield from graph.all_tensors()


@dataclass(frozen=True)
class OnnxFile:
    """A parsed and checked model; `opsets` holds the version of each domain."""

    path: Path
    file_bytes: int
    ir_version: int
    producer: str
    opsets: dict[str, int]
    metadata: dict[str, str]
    graph: Graph

    @classmethod
    def open(cls, path: Path) -> "OnnxFile":
        """Parse and check a file; EdgekitError where it or its external data is not sound."""
        from edgekit.onnx_checks import check_external, check_graph
        from edgekit.onnx_messages import read_model

        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if not 0 < size <= MAX_BYTES:
                    raise EdgekitError(f"{path}: has {size} bytes, which no ONNX model has")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    parts = read_model(Buffer(data, _MAX_FIELDS, _MAX_TEXT_BYTES).message())
            check_graph(parts.graph)
            check_external(path, parts.graph)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
        except ProtobufError as error:
            raise EdgekitError(f"{path}: is no ONNX model or is damaged: {error}") from error
        except UnsoundModel as error:
            raise EdgekitError(f"{path}: {error}") from error
        return cls(path, size, **vars(parts))

    def operators(self) -> dict[str, int]:
        """Return operators with the number of their nodes, most frequent first."""
        return dict(Counter(node.operator for node in self.graph.all_nodes()).most_common())

    def external_files(self) -> list[Path]:
        """Return the files beside the model that hold constants."""
        names = {tensor.location for tensor in self.graph.all_tensors() if tensor.location}
        return [self.path.parent / name for name in sorted(names)]

    def read(self, tensor: Tensor) -> bytes:
        """Return the bytes of a constant as they are stored: little-endian, small types packed.

        EdgekitError where the file spells its values one by one, as it does with no weight.
        """
        if tensor.offset is None:
            raise EdgekitError(f"{self.path}: {tensor.name} is not stored as bytes")
        path = self.path.parent / tensor.location if tensor.location else self.path
        try:
            with path.open("rb") as file:
                file.seek(tensor.offset)
                return file.read(tensor.stored_bytes)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
