"""What an artifact or a bare `.pte` is made of, read from the file itself."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.pte import FORWARD, Method, Program, Span
from edgekit.exporters.xnnpack_graph import BACKEND, GraphConstant, read_graph
from edgekit.tables import markdown_table

TARGET = "executorch"
TABLES = "norms, convolutions, tables"
_EMBEDDING_OPERATOR = re.compile(r".*::embedding(_byte|_4bit|_2bit)?\b.*")
_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")
_STORAGE = {
    "qcint8": "int8 per channel",
    "qcint4": "int4 per channel",
    "qbint4": "int4 in groups of {}",
    "fp32": "float32",
}


@dataclass(frozen=True)
class Component:
    """A part of the file; each byte belongs to exactly one, so their sum is the file's size."""

    name: str
    tensors: int
    bytes: int


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
    weights: list[tuple[str, str, int, int]]
    manifest: dict[str, Any] | None
    checked_files: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        facts = asdict(self) | {"path": str(self.path)}
        names = ("kind", "scheme", "tensors", "bytes")
        facts["weights"] = [dict(zip(names, row, strict=True)) for row in self.weights]
        return facts

    def text(self) -> str:
        """Return the report as Markdown tables; what a file calls itself cannot steer a terminal."""
        parts = [*_introduction(self), _component_table(self)]
        if self.weights:
            rows = [[kind, scheme, str(n), f"{size:,}"] for kind, scheme, n, size in self.weights]
            parts.append(markdown_table(["weights", "scheme", "tensors", "bytes"], rows))
        parts.append(_count_table("delegates", "parts", self.delegates))
        if self.nodes:
            parts.append(_count_table("operators inside", "nodes", self.nodes))
        parts.append(_count_table("operators outside the delegates", "calls", self.operators))
        parts.append(_value_table("metadata", self.metadata))
        verification = (self.manifest or {}).get("verification")
        if isinstance(verification, dict):
            parts.append(_value_table("verification", verification))
        if self.checked_files is not None:
            parts.append(f"All {self.checked_files} files have the content that was exported.")
        text = "\n\n".join(parts)
        return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def inspect(path: Path, check: bool = False) -> Report:
    """Report on an artifact folder or a `.pte`.

    `check` compares every file's sha256 with the manifest: VerificationError names those that
    differ. EdgekitError where something is missing, foreign or corrupt.
    """
    if path.is_file():
        if check:
            raise EdgekitError(
                f"{path}: --check needs the artifact folder, whose manifest holds the sha256"
            )
        return _report(path, None, None)
    artifact = Artifact.open(path)
    if artifact.target != TARGET:
        raise EdgekitError(f"{path}: target {artifact.target!r} cannot be inspected, only {TARGET}")
    if check:
        _check(artifact)
    return _report(
        artifact.model_path, artifact.manifest, len(artifact.manifest["files"]) if check else None
    )


def _check(artifact: Artifact) -> None:
    try:
        damaged = artifact.damaged_files()
    except OSError as error:
        raise EdgekitError(f"{artifact.folder}: cannot be read: {error.strerror}") from error
    if damaged:
        raise VerificationError(
            f"{artifact.folder}: damaged since it was exported: {', '.join(damaged)}; export again"
        )


def _report(path: Path, manifest: dict[str, Any] | None, checked: int | None) -> Report:
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
        weights=_weights(manifest["tensors"]) if manifest else [],
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


def _weights(table: list[dict[str, Any]]) -> list[tuple[str, str, int, int]]:
    """Sum the manifest's rows over the layers."""
    counts, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in table:
        kind = _LAYER.sub("", row["tensor"]).removesuffix(".weight")
        counts[kind, row["scheme"]] += 1
        sizes[kind, row["scheme"]] += row["bytes"]
    return [(*key, counts[key], sizes[key]) for key in counts]


def _introduction(report: Report) -> list[str]:
    size = f"{report.path}: {report.file_bytes:,} bytes ({report.file_bytes / 1e6:,.1f} MB)"
    memory = f"memory for activations and state: {report.planned_bytes / 1e6:,.1f} MB"
    if report.manifest is None:
        return [size, memory]
    made = report.manifest
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return [
        size,
        f"{made['model']['id']}, recipe {made.get('recipe')}, context {made['context']}",
        f"made by {versions}",
        memory,
    ]


def _component_table(report: Report) -> str:
    rows = [
        [
            part.name,
            str(part.tensors) if part.tensors else "-",
            f"{part.bytes:,}",
            f"{part.bytes / report.file_bytes:.1%}",
        ]
        for part in report.components
    ]
    return markdown_table(["in the file", "pieces", "bytes", "share"], rows)


def _count_table(title: str, unit: str, counts: dict[str, int]) -> str:
    rows = [[name, str(count)] for name, count in counts.items()]
    return markdown_table([title, unit], rows or [["none", "0"]])


def _value_table(title: str, values: dict[str, Any]) -> str:
    rows = [
        [str(name), f"{value:.6g}" if isinstance(value, float) else str(value)]
        for name, value in values.items()
    ]
    return markdown_table([title, "value"], rows or [["none", "-"]])
