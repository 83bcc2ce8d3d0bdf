"""What an ONNX artifact, a folder of onnxruntime-genai or a bare `.onnx` is made of."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.exporters.inspect.file_report import FileReport, is_module, weight_rows
from edgekit.exporters.inspect.layers import Arithmetic
from edgekit.exporters.inspect.tables import (
    TABLES,
    Piece,
    components,
    count_table,
    name_shared,
    value_table,
)
from edgekit.exporters.onnx.names import SCALES, ZERO_POINTS
from edgekit.formats.artifact.manifest import Manifest
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.model import Node

_TOKENS = "input_ids"
_LAYERS = frozenset(
    {
        *("QLinearConv", "QGemm", "QLinearMatMul"),
        *("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
        *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    }
)
_MOVES = frozenset({"DequantizeLinear", "Transpose", "Reshape"})


@dataclass(frozen=True)
class Report(FileReport):
    """An ONNX model's.

    `operators` are the nodes of the file, `run` those that ONNX Runtime runs for one token after
    its rewriting, empty where it runs none, and then `not_run` says why.
    """

    operators: dict[str, int]
    run: dict[str, int]
    not_run: str | None
    arithmetic: Arithmetic | None
    opsets: dict[str, int]

    def tables(self) -> list[str]:
        """Operators, as they are in the file and as they run."""
        sets = {name or "ai.onnx": version for name, version in self.opsets.items()}
        return [
            count_table("operators in the file", "nodes", self.operators),
            count_table("operators as ONNX Runtime runs them", "nodes", self.run),
            *([self.not_run] if self.not_run else []),
            *(self.arithmetic.text() if self.arithmetic else []),
            value_table("operator sets", sets),
        ]


def report(path: Path, manifest: Manifest | None, checked: int | None) -> Report:
    """Report on a model; EdgekitError where it is no sound ONNX file."""
    from edgekit.exporters.onnx.optimised import kernels_run

    model = OnnxFile.open(path)
    kernels, not_run = list[tuple[str, bool]](), None
    try:
        kernels = kernels_run(path)
    except EdgekitError as error:
        not_run = str(error)
    files = [path, *model.external_files()]
    sizes = [file.stat().st_size for file in files]
    starts = {file.name: sum(sizes[:place]) for place, file in enumerate(files)}
    parts = list(_pieces(model, starts))
    parts += _graph(parts, model.file_bytes)
    return Report(
        path=path,
        file_bytes=sum(sizes),
        components=components(name_shared(parts), sum(sizes)),
        operators=model.operators(),
        run=dict(Counter(name for name, _ in kernels).most_common()),
        not_run=not_run,
        arithmetic=Arithmetic.of(kernels, _LAYERS, _MOVES) if is_module(manifest) else None,
        opsets=model.opsets,
        metadata={"ir_version": model.ir_version, "producer": model.producer, **model.metadata},
        weights=weight_rows(manifest),
        manifest=manifest,
        checked_files=checked,
    )


def _pieces(model: OnnxFile, starts: dict[str, int]) -> Iterator[Piece]:
    """Yield the constants; files lie one behind the other, each from its place in `starts`."""
    names = _names(model)
    for constant in model.graph.all_tensors():
        if constant.offset is not None:
            start = starts[constant.location or model.path.name]
            name = names.get(constant.name, TABLES)
            yield Piece(name, start + constant.offset, constant.stored_bytes)


def _graph(pieces: list[Piece], model_bytes: int) -> list[Piece]:
    """Return what constants leave of the model's own file: nodes and names."""
    inside = sorted((p.offset, p.offset + p.size) for p in pieces if p.offset < model_bytes)
    gaps, end = [], 0
    for start, stop in [*inside, (model_bytes, model_bytes)]:
        if start > end:
            gaps.append(Piece("graph", end, start - end))
        end = max(end, stop)
    return gaps


def _names(model: OnnxFile) -> dict[str, str]:
    """Name the constants by what the nodes that use them do."""
    finder, labels = _Finder(model), dict[str, list[str]]()
    for node in model.graph.all_nodes():
        found = finder.visit(node)
        for constant in found.constants if found else ():
            labels.setdefault(constant, []).append(found.label if found else "")
    # a constant may be embedding and head at once
    return {name: ", and ".join(dict.fromkeys(found)) for name, found in labels.items()}


@dataclass(frozen=True)
class _Matrix:
    """Constants that are one matrix, and how it is stored; `label` says what for."""

    constants: tuple[str, ...]
    storage: str
    label: str = ""


class _Finder:
    """Follows constants through what only changes their form, to the nodes that use them."""

    def __init__(self, model: OnnxFile) -> None:
        self._constants = {tensor.name: tensor for tensor in model.graph.initializers}
        self._made: dict[str, _Matrix] = {}
        self._tokens = {_TOKENS}
        logits = (value for value in model.graph.outputs if value.name == "logits" and value.shape)
        self._vocabulary = next((value.shape[-1] for value in logits if value.shape), None)

    def visit(self, node: Node) -> _Matrix | None:
        """Return the matrix that a node multiplies by or looks up in, None where it does neither.

        Nodes must come in the order in which they run.
        """
        if not node.outputs:
            return None
        matrices = [self._matrix(name) for name in node.inputs]
        first, second = [*matrices, None, None][:2]
        match node.op_type:
            case "DequantizeLinear" if first:
                self._made[node.outputs[0]] = self._dequantized(node, matrices)
            case "Reshape" | "Transpose" if first:
                self._made[node.outputs[0]] = first
            case "ScatterElements" if node.inputs[0] in self._tokens:
                self._tokens.add(node.outputs[0])  # ids in another order
            case "Gather" if first and self._tokens.issuperset(node.inputs[1:2]):
                return self._looked_up(first)
            case "GatherBlockQuantized" if first:
                storage = _blocks(node)
                return _Matrix(_all([first, *matrices[2:]]), storage, f"embedding, {storage}")
            case "MatMulNBits" if second:
                return self._product(node, _all(matrices[1:]), _blocks(node))
            case "MatMul" | "FusedMatMul" | "Gemm" if second:
                return self._product(node, second.constants, second.storage)
        return None

    def _matrix(self, name: str) -> _Matrix | None:
        if name in self._constants:
            return _Matrix((name,), self._constants[name].dtype)
        return self._made.get(name)

    def _dequantized(self, node: Node, matrices: list[_Matrix | None]) -> _Matrix:
        codes = self._constants[_all(matrices[:1])[0]]
        block = node.attributes.get("block_size") or 0
        return _Matrix(_all(matrices), f"{codes.dtype} " + (_groups(block) if block else _CHANNEL))

    def _looked_up(self, table: _Matrix) -> _Matrix:
        """Return a table, named by the codes where it is their scales."""
        name = table.constants[0]
        codes = self._constants.get(name.removesuffix(SCALES).removesuffix(ZERO_POINTS))
        storage = table.storage if codes is None else codes.dtype
        return _Matrix(table.constants, storage, f"embedding, {storage}")

    def _product(self, node: Node, constants: tuple[str, ...], storage: str) -> _Matrix:
        sizes = (*self._constants[constants[0]].shape, node.attributes.get("N"))
        head = isinstance(self._vocabulary, int) and self._vocabulary in sizes
        kind = "head" if head else "linears"
        return _Matrix(constants, storage, f"{kind}, {storage}")


_CHANNEL = "per channel"


def _groups(size: object) -> str:
    return f"in groups of {size}"


def _blocks(node: Node) -> str:
    """Return the storage of MatMulNBits and GatherBlockQuantized."""
    return f"int{node.attributes.get('bits', 4)} {_groups(node.attributes.get('block_size', 128))}"


def _all(matrices: list[_Matrix | None]) -> tuple[str, ...]:
    return tuple(name for matrix in matrices if matrix for name in matrix.constants)
