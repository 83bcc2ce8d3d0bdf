"""What an ExecuTorch artifact or a bare `.pte` is made of, read from the file itself."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.exporters.inspect.file_report import FileReport, is_module, weight_rows
from edgekit.exporters.inspect.layers import Arithmetic
from edgekit.exporters.inspect.tables import (
    TABLES,
    Component,
    Piece,
    components,
    count_table,
    name_shared,
)
from edgekit.formats.artifact.manifest import Manifest
from edgekit.formats.pte.program import FORWARD, Method, Program, Span
from edgekit.formats.pte.xnnpack_graph import BACKEND, Graph, GraphConstant, read_graph

_EMBEDDING_OPERATOR = re.compile(r".*::embedding(_byte|_4bit|_2bit)?\b.*")
_STORAGE = {
    "qcint8": "int8 per channel",
    "qint8": "int8 per tensor",
    "qcint4": "int4 per channel",
    "qbint4": "int4 in groups of {}",
    "fp32": "float32",
}

_LAYERS = frozenset(
    {
        *("Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected"),
        *("aten::convolution.out", "aten::linear.out", "aten::addmm.out", "aten::mm.out"),
    }
)
_MOVES = frozenset({"Convert", "StaticTranspose", "StaticReshape", "Copy", "aten::sym_size.int"})
_INTEGER_FILTERS, _BIASES = ("qcint8", "qint8"), ("qcint32", "qint32")


@dataclass(frozen=True)
class Report(FileReport):
    """A program's.

    `operators` are calls outside the delegates in one run of `forward`, `nodes` the delegates'
    own; `arithmetic` is that of a module, None for a language model, whose layers take floats;
    `planned_bytes` is the memory for activations and state.
    """

    delegates: dict[str, int]
    nodes: dict[str, int]
    operators: dict[str, int]
    arithmetic: Arithmetic | None
    planned_bytes: int

    def facts(self) -> list[str]:
        """What memory the program asks for."""
        return [f"memory for activations and state: {self.planned_bytes / 1e6:,.1f} MB"]

    def tables(self) -> list[str]:
        """Delegates, and operators inside and outside of them."""
        inside = [count_table("operators inside", "nodes", self.nodes)] if self.nodes else []
        return [
            count_table("delegates", "parts", self.delegates),
            *inside,
            count_table("operators outside the delegates", "calls", self.operators),
            *(self.arithmetic.text() if self.arithmetic else []),
        ]


def report(path: Path, manifest: Manifest | None, checked: int | None) -> Report:
    """Report on a `.pte`; EdgekitError where it is foreign or corrupt."""
    program = Program.open(path)
    forward = program.methods.get(FORWARD)
    if forward is None:
        names = ", ".join(map(repr, program.methods)) or "none"
        raise EdgekitError(f"{path}: has no method {FORWARD!r}, only {names}")
    graphs = [
        read_graph(program, delegate)
        for delegate in forward.delegates
        if delegate.backend == BACKEND
    ]
    constants = [constant for graph in graphs for constant in graph.constants]
    head_rows = program.constant_methods.get("get_vocab_size")
    nodes = Counter(node for graph in graphs for node in graph.nodes)
    return Report(
        path=path,
        file_bytes=program.file_bytes,
        components=_components(program, forward, constants, head_rows),
        delegates=dict(Counter(delegate.backend for delegate in forward.delegates)),
        nodes=dict(nodes.most_common()),
        operators=forward.operators,
        arithmetic=_arithmetic(graphs, forward) if is_module(manifest) else None,
        planned_bytes=forward.planned_bytes,
        metadata=_finite(path, program.constant_methods),
        weights=weight_rows(manifest),
        manifest=manifest,
        checked_files=checked,
    )


def _arithmetic(graphs: Sequence[Graph], forward: Method) -> Arithmetic:
    """Outside the delegates every operator of ATen works on floats."""
    inside = [
        (node, result == "fp32")
        for graph in graphs
        for node, result in zip(graph.nodes, graph.results, strict=True)
    ]
    outside = [
        (name, True)
        for name, count in forward.operators.items()
        for _ in range(count)
        if name.startswith("aten::")
    ]
    return Arithmetic.of([*inside, *outside], _LAYERS, _MOVES)


def _finite(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON cannot say."""
    for name, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise EdgekitError(f"{path}: its method {name!r:.60} gives {value}, no finite number")
    return metadata


def _components(
    program: Program, forward: Method, constants: Iterable[GraphConstant], head_rows: object
) -> list[Component]:
    parts = [
        *_kernel_parts(forward),
        *_graph_parts(constants, head_rows),
        *(("delegate graphs", item.blob) for item in forward.delegates),
        ("program", program.program),
        *(("other data", span) for span in program.named.values()),
    ]
    spans = [Piece(name, span.offset, span.size) for name, span in parts]
    return components(name_shared(spans), program.file_bytes)


def _kernel_parts(forward: Method) -> Iterator[tuple[str, Span]]:
    """Yield the constants outside the delegates' blobs; some are inputs of delegates."""
    for call in forward.kernel_calls:
        constants = [item for item in call.arguments if item is not None]
        if constants and _EMBEDDING_OPERATOR.fullmatch(call.operator):
            # Only embedding_4bit takes bytes: two codes each.
            storage = "int4" if constants[0].dtype == "uint8" else constants[0].dtype
            yield from ((f"embedding, {storage}", item.span) for item in constants)
    yield from ((TABLES, constant.span) for constant in forward.constants)


def _graph_parts(
    constants: Iterable[GraphConstant], head_rows: object
) -> Iterator[tuple[str, Span]]:
    for constant in constants:
        name = _part_name(constant, head_rows)
        yield name, constant.data
        if constant.scales is not None:
            yield name, constant.scales


def _part_name(constant: GraphConstant, head_rows: object) -> str:
    """Name a delegate's constant; a norm's mean and RoPE's rotation are float linears too."""
    if constant.datatype in _BIASES:
        return "biases, int32"
    if not constant.is_filter and constant.datatype not in _INTEGER_FILTERS:
        return TABLES
    storage = _STORAGE.get(constant.datatype, constant.datatype).format(constant.group_size)
    if not constant.is_filter:
        return f"convolutions, {storage}"
    return f"{'head' if constant.shape[:1] == (head_rows,) else 'linears'}, {storage}"
