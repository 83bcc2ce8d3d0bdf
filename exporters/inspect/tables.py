"""Tables of reports, and the components that a file's bytes belong to."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.common.tables import markdown_table

TABLES = "norms, convolutions, tables"


@dataclass(frozen=True)
class Component:
    """A part of the file; each byte belongs to exactly one, so their sum is the file's size."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Piece:
    """Bytes of a file and the component they are a part of."""

    name: str
    offset: int
    size: int


def components(pieces: Sequence[Piece], file_bytes: int) -> list[Component]:
    """Give every byte to the first piece that holds it; what none holds is padding."""
    counts, sizes, end = Counter[str](), Counter[str](), 0
    order = {name: number for number, name in enumerate(dict.fromkeys(p.name for p in pieces))}
    for piece in sorted(pieces, key=lambda piece: (piece.offset, order[piece.name])):
        new = piece.offset + piece.size - max(end, piece.offset)
        if new > 0:
            counts[piece.name] += 1
            sizes[piece.name] += new
            end = piece.offset + piece.size
    found = [Component(name, counts[name], sizes[name]) for name in order if sizes[name]]
    return [*found, Component("padding", 0, file_bytes - sum(sizes.values()))]


def name_shared(pieces: Sequence[Piece]) -> list[Piece]:
    """Name bytes that are embedding and head at once as both."""
    embedding, head = (
        {(p.offset, p.size): p.name for p in pieces if p.name.startswith(kind)}
        for kind in ("embedding, ", "head, ")
    )
    both = {span: f"{embedding[span]}, and {head[span]}" for span in embedding.keys() & head.keys()}
    return [Piece(both.get((p.offset, p.size), p.name), p.offset, p.size) for p in pieces]


def component_table(components: Sequence[Component], file_bytes: int) -> str:
    """Return the components with their shares of the file."""
    rows = [
        [
            part.name,
            str(part.tensors) if part.tensors else "-",
            f"{part.bytes:,}",
            f"{part.bytes / file_bytes:.1%}",
        ]
        for part in components
    ]
    return markdown_table(["in the file", "pieces", "bytes", "share"], rows)


def count_table(title: str, unit: str, counts: Mapping[str, int]) -> str:
    """Return names with counts."""
    rows = [[name, str(count)] for name, count in counts.items()]
    return markdown_table([title, unit], rows or [["none", "0"]])


def value_table(title: str, values: Mapping[str, Any]) -> str:
    """Return names with values of any type."""
    rows = [
        [str(name), f"{value:.6g}" if isinstance(value, float) else str(value)]
        for name, value in values.items()
    ]
    return markdown_table([title, "value"], rows or [["none", "-"]])


def joined(parts: Sequence[str]) -> str:
    """Join the parts of a report; nothing in it can steer a terminal."""
    text = "\n\n".join(parts)
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
