"""What an ExecuTorch artifact or a bare `.pte` is made of, read from the file itself."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.exporters.inspect_tables import (
    Component,
    WeightRows,
    checks,
    component_table,
    count_table,
    introduction,
    joined,
    value_table,
    weight_rows,
    weight_table,
    weights_json,
)
from edgekit.exporters.pte import FORWARD, Method, Program, Span
from edgekit.exporters.xnnpack_graph import BACKEND, GraphConstant, read_graph

TABLES = "norms, convolutions, tables"
_EMBEDDING_OPERATOR = re.compile(r".*::embedding(_byte|_4bit|_2bit)?\b.*")
_STORAGE = {
    "qcint8": "int8 per channel",
    "qcint4": "int4 per channel",
    "qbint4": "int4 in groups of {}",
    "fp32": "float32",
}


@dataclass(frozen=True)
class Report:
    """What `edgekit inspect` shows.

    `operators` are calls outside the delegates in one run of `forward`, `nodes` the delegates'
    own; `planned_bytes` is the memory for activations and state; `manifest` is None for a bare
    file; `weights` rows are (kind, scheme, tensors, bytes) of the manifest's table.
    """

    path: Path
    file_bytes: int
    components: list[Component]
    delegates: dict[str, int]
    nodes: dict[str, int]
    operators: dict[str, int]
    planned_bytes: int
    metadata: dict[str, Any]
    weights: WeightRows
    manifest: dict[str, Any] | None
    checked_files: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        facts = asdict(self) | {"path": str(self.path)}
        facts["weights"] = weights_json(self.weights)
        return facts

    def text(self) -> str:
        """Return the report as Markdown tables; what a file calls itself cannot steer a terminal."""
        parts = [
            *introduction(self.path, self.file_bytes, self.manifest),
            f"memory for activations and state: {self.planned_bytes / 1e6:,.1f} MB",
            component_table(self.components, self.file_bytes),
            *weight_table(self.weights),
            count_table("delegates", "parts", self.delegates),
        ]
        if self.nodes:
            parts.append(count_table("operators inside", "nodes", self.nodes))
        parts.append(count_table("operators outside the delegates", "calls", self.operators))
        parts.append(value_table("metadata", self.metadata))
        return joined([*parts, *checks(self.manifest, self.checked_files)])


def report(path: Path, manifest: dict[str, Any] | None, checked: int | None) -> Report:
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
        planned_bytes=forward.planned_bytes,
        metadata=_finite(path, program.constant_methods),
        weights=weight_rows(manifest),
        manifest=manifest,
        checked_files=checked,
    )


def _finite(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON cannot say."""
    for name, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise EdgekitError(f"{path}: its method {name!r:.60} gives {value}, no finite number")
    return metadata


def _components(
    program: Program, forward: Method, constants: Iterable[GraphConstant], head_rows: object
) -> list[Component]:
    """Give every byte to the first part that holds it; what nobody holds is padding."""
    parts = [
        *_kernel_parts(forward),
        *_graph_parts(constants, head_rows),
        *(("delegate graphs", item.blob) for item in forward.delegates),
        ("program", program.program),
        *(("other data", span) for span in program.named.values()),
    ]
    parts = _name_shared(parts)
    counts, sizes, end = Counter[str](), Counter[str](), 0
    order = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in parts))}
    for name, span in sorted(parts, key=lambda part: (part[1].offset, order[part[0]])):
        new = span.offset + span.size - max(end, span.offset)
        if new > 0:
            counts[name] += 1
            sizes[name] += new
            end = span.offset + span.size
    found = [Component(name, counts[name], sizes[name]) for name in order if sizes[name]]
    rest = program.file_bytes - sum(sizes.values())
    return [*found, Component("padding", 0, rest)]


def _name_shared(parts: list[tuple[str, Span]]) -> list[tuple[str, Span]]:
    """Name bytes that are embedding and head at once as both."""
    embedding, head = (
        {span: name for name, span in parts if name.startswith(kind)}
        for kind in ("embedding, ", "head, ")
    )
    both = {span: f"{embedding[span]}, and {head[span]}" for span in embedding.keys() & head.keys()}
    return [(both.get(span, name), span) for name, span in parts]


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
    if not constant.is_filter:
        return TABLES
    storage = _STORAGE.get(constant.datatype, constant.datatype).format(constant.group_size)
    return f"{'head' if constant.shape[:1] == (head_rows,) else 'linears'}, {storage}"
