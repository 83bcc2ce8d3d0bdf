"""No byte twice: what the program and its delegates both hold is stored once in a `.pte`.

The codes of a tied embedding are a constant of the program, for the lookup, and named data of a
delegate, for the head. ExecuTorch writes both; its loaders only ask where a segment begins and how
long it is, so the named data's segment may lie inside the constants' one.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from edgekit.formats.pte.flatbuffer import Flatbuffer, Table
from edgekit.formats.pte.header import SEGMENTS_SIZE_PLACE, PteHeader
from edgekit.formats.pte.program import (
    FORWARD,
    KEY,
    NAMED_DATA,
    SEGMENT_INDEX,
    SEGMENTS,
    Program,
    Span,
)

_LEAST_BYTES = 1024  # below that a segment's alignment eats the gain
_BLOCK = 16 << 20


def store_once(path: Path) -> None:
    """Point named data that equal a constant at the constant, and cut their own segments out."""
    header, program = PteHeader.read(path), Program.open(path)
    with path.open("r+b") as file:
        data = bytearray(file.read(header.program_bytes))
        root = Flatbuffer(bytes(data)).root(b"ET12")
        segments = root.tables(SEGMENTS)
        starts = [segment.number(0, "Q") + header.segment_base for segment in segments]
        moved = _found_among_constants(file, program, root)
        cuts = [_whole_segment(starts, starts[index], header.file_bytes) for index in moved]
        for index, start in enumerate(starts):
            place = segments[index].place(0)
            if place is not None:  # the first segment's offset, 0, is not stored
                start = moved.get(index, start - sum(c.size for c in cuts if c.offset < start))
                struct.pack_into("<Q", data, place, start - header.segment_base)
        size = header.file_bytes - sum(cut.size for cut in cuts) - header.segment_base
        struct.pack_into("<Q", data, SEGMENTS_SIZE_PLACE, size)
        for cut in sorted(cuts, key=lambda cut: -cut.offset):
            _remove(file, cut)
        file.seek(0)
        file.write(data)


def _found_among_constants(file: BinaryIO, program: Program, root: Table) -> dict[int, int]:
    """Return where the data of a segment also lie: its index -> the place among the constants."""
    constants = {constant.span for constant in program.methods[FORWARD].constants}
    found = {}
    for entry in root.tables(NAMED_DATA):
        named = program.named[entry.text(KEY)]
        for span in constants - {named}:
            if named.size == span.size >= _LEAST_BYTES and _equal(file, named, span):
                found[entry.number(SEGMENT_INDEX, "I")] = span.offset
    return found


def _equal(file: BinaryIO, first: Span, second: Span) -> bool:
    for done in range(0, first.size, _BLOCK):
        size = min(_BLOCK, first.size - done)
        if _read(file, first.offset + done, size) != _read(file, second.offset + done, size):
            return False
    return True


def _whole_segment(starts: list[int], start: int, end_of_file: int) -> Span:
    """Return a segment with the padding behind it, so that the next ones stay aligned."""
    end = min((other for other in starts if other > start), default=end_of_file)
    return Span(start, end - start)


def _remove(file: BinaryIO, cut: Span) -> None:
    """Move what lies behind to the place of the cut."""
    source, target = cut.offset + cut.size, cut.offset
    while block := _read(file, source, _BLOCK):
        file.seek(target)
        file.write(block)
        source, target = source + len(block), target + len(block)
    file.truncate(target)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
