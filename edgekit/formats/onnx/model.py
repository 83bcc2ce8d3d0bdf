"""What an ONNX model is made of: graphs of nodes, their constants, inputs and outputs."""

from collections.abc import Iterator
from dataclasses import dataclass

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
