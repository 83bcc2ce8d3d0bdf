"""What must hold before an ONNX graph is run, and is not left to the runtime to find out."""

import re
from pathlib import Path

from edgekit.formats.onnx.model import Graph, Node, UnsoundModel

_FILE_NAME = re.compile(r"\w[\w.+-]{0,254}", re.ASCII)


def check_graph(graph: Graph) -> None:
    """Refuse names given twice and nodes that use what is not made before them.

    So a graph without cycles is left, in the order that ONNX asks for. UnsoundModel names the
    first offender.
    """
    _check_graph(graph, set())


def _check_graph(graph: Graph, known: set[str]) -> None:
    """Check a graph that sees the names `known` around it; they are the same afterwards."""
    inputs = [value.name for value in graph.inputs]
    constants = [tensor.name for tensor in graph.initializers]
    outputs = [value.name for value in graph.outputs]
    for names, what in ((inputs, "input"), (constants, "initializer"), (outputs, "output")):
        _check_unique(names, what)
    own = {*inputs, *constants}  # an initializer may be an input's default
    if own & known:
        raise UnsoundModel(f"a sub-graph hides the name {min(own & known)!r:.60}")
    known |= own
    for node in graph.nodes:
        own.update(_check_node(node, known))
    for name in outputs:
        if name not in known:
            raise UnsoundModel(f"output {name!r:.60} is made by no node")
    known -= own


def _check_unique(names: list[str], what: str) -> None:
    seen = set[str]()
    for name in names:
        if not name or name in seen:
            raise UnsoundModel(f"{what} {name!r:.60} is there twice or has no name")
        seen.add(name)


def _check_node(node: Node, known: set[str]) -> list[str]:
    """Check a node against the names that are known before it; add and return what it makes."""
    for name in node.inputs:
        if name and name not in known:
            raise UnsoundModel(
                f"{node.op_type!r:.60} uses {name!r:.60}, which no node before it makes"
            )
    for graph in node.graphs:
        _check_graph(graph, known)
    made = [name for name in node.outputs if name]
    for name in made:
        if name in known:
            raise UnsoundModel(f"{node.op_type!r:.60} makes {name!r:.60}, which is there already")
        known.add(name)
    return made


def check_external(model: Path, graph: Graph) -> None:
    """Refuse external data outside the model's folder or beyond the end of its file.

    A link is followed where it stays in the folder of what the model's own name leads to: so lie
    the files in a hub's cache.
    """
    sizes: dict[str, int] = {}
    for tensor in graph.all_tensors():
        if tensor.location is None or tensor.offset is None:
            continue
        if tensor.location not in sizes:
            sizes[tensor.location] = _external_bytes(model, tensor.location)
        end = tensor.offset + tensor.stored_bytes
        if end > sizes[tensor.location]:
            raise UnsoundModel(
                f"tensor {tensor.name!r:.60} ends at byte {end} of {tensor.location}, which has "
                f"{sizes[tensor.location]}: it is truncated or was replaced"
            )


def _external_bytes(model: Path, location: str) -> int:
    if not _FILE_NAME.fullmatch(location):
        raise UnsoundModel(f"external data {location!r:.60} could leave the folder")
    path = model.parent / location
    if not path.is_file():
        raise UnsoundModel(f"external data {location} is not there or is no file")
    if path.resolve().parent not in (model.parent.resolve(), model.resolve().parent):
        raise UnsoundModel(f"external data {location} is a link that leaves the folder")
    return path.stat().st_size
