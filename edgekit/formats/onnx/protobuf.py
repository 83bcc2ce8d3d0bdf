"""Reads protocol-buffer messages from bytes that nobody vouches for, without copying them.

Format: https://protobuf.dev/programming-guides/encoding. A message is a span of the bytes, so the
weights inside a file are stepped over, never read; a corrupt message ends in `ProtobufError` and
one made of endless small fields in a used-up budget.
"""

import struct
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # the wire types in use; 3 and 4 are obsolete groups
_FIXED = {FIXED64: 8, FIXED32: 4}
_MAX_VARINT_BYTES = 10
_PIECE = 1 << 20


class ProtobufError(ValueError):
    """The bytes are no message of the expected kind."""


class Field(NamedTuple):
    """One field: its number, its wire type, and the number or the span of bytes that it holds."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class Buffer:
    """Bytes with budgets: of fields that may be visited, and of bytes of text that may be read."""

    def __init__(self, data: bytes | mmap, fields: int, text_bytes: int) -> None:
        """Wrap the bytes of one file."""
        self.data = data
        self._fields, self._text_bytes = fields, text_bytes

    def message(self) -> "Message":
        """Return all bytes as one message."""
        return Message(self, 0, len(self.data))

    def spend(self, fields: int = 0, text_bytes: int = 0) -> None:
        """Take from the budgets."""
        self._fields -= fields
        self._text_bytes -= text_bytes
        if self._fields < 0 or self._text_bytes < 0:
            raise ProtobufError("it holds too many fields or too much text")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """Return the unsigned number at `at` and the place behind it."""
        if at < end and self.data[at] < 0x80:  # most are this short
            return self.data[at], at + 1
        value = shift = 0
        for place in range(at, min(end, at + _MAX_VARINT_BYTES)):
            byte = self.data[place]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (1 << 64) - 1, place + 1
            shift += 7
        raise ProtobufError(f"the number at {at} does not end")


class Message:
    """A span of the bytes, read as fields."""

    def __init__(self, buffer: Buffer, start: int, end: int) -> None:
        """Take the span from `start` to `end`; nothing is read yet."""
        self._buffer, self.start, self.end = buffer, start, end

    def __iter__(self) -> Iterator[Field]:
        """Yield the fields in their order."""
        at, end, buffer = self.start, self.end, self._buffer
        while at < end:
            buffer.spend(fields=1)
            tag, at = buffer.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise ProtobufError(f"a field before {at} has the number 0")
            if wire == VARINT:
                value, at = buffer.varint(at, end)
                yield Field(number, wire, value, at, at)
                continue
            if wire == BYTES:
                size, at = buffer.varint(at, end)
            elif wire in _FIXED:
                size = _FIXED[wire]
            else:
                raise ProtobufError(f"field {number} before {at} has the wire type {wire}")
            if size > end - at:
                raise ProtobufError(f"field {number} of {size} bytes at {at} does not fit")
            yield Field(number, wire, 0, at, at + size)
            at += size

    def sub(self, field: Field) -> "Message":
        """Return a field as a message."""
        return Message(self._buffer, *_span(field))

    def text(self, field: Field) -> str:
        """Return a field as a string; ProtobufError where it is no UTF-8."""
        start, end = _span(field)
        self._buffer.spend(text_bytes=end - start)
        try:
            return self._buffer.data[start:end].decode()
        except UnicodeDecodeError as error:
            raise ProtobufError(f"the text at {start} is no UTF-8") from error

    def loose_text(self, field: Field, most: int) -> str:
        """Return the first `most` bytes of a field as text, whatever they are."""
        start, end = _span(field)
        return self._buffer.data[start : min(end, start + most)].decode(errors="replace")

    def packed(self, field: Field, width: int | None) -> int:
        """Return how many numbers of `width` bytes (None: varints) a packed field holds."""
        start, end = _span(field)
        if width is not None:
            return (end - start) // width
        count = 0
        for at in range(start, end, _PIECE):
            piece = np.frombuffer(self._buffer.data[at : min(end, at + _PIECE)], np.uint8)
            count += int(np.count_nonzero(piece < 0x80))  # the last byte of each
        return count

    def integers(self, field: Field, most: int) -> list[int]:
        """Return a repeated int64, packed or a single one of it; at most `most` numbers."""
        if field.wire == VARINT:
            return [signed(field.value)]
        at, end = _span(field)
        found: list[int] = []
        while at < end:
            if len(found) == most:
                raise ProtobufError(f"the list at {field.start} holds more than {most} numbers")
            value, at = self._buffer.varint(at, end)
            found.append(signed(value))
        return found

    def float32(self, field: Field) -> float:
        """Return a field as a float."""
        if field.wire != FIXED32:
            raise ProtobufError(f"field {field.number} before {field.end} is no float")
        value: float = struct.unpack_from("<f", self._buffer.data, field.start)[0]
        return value


def integer(field: Field) -> int:
    """Return a field as an int64."""
    if field.wire != VARINT:
        raise ProtobufError(f"field {field.number} before {field.end} is no integer")
    return signed(field.value)


def signed(value: int) -> int:
    """Return the int64 whose two's complement is given."""
    return value - (1 << 64) if value >> 63 else value


def _span(field: Field) -> tuple[int, int]:
    if field.wire != BYTES:
        raise ProtobufError(f"field {field.number} before {field.end} has the wrong wire type")
    return field.start, field.end
