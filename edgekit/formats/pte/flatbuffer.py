"""Reads FlatBuffers tables from bytes that nobody vouches for: every access is checked.

Format: https://flatbuffers.dev/internals. The `flatbuffers` package trusts offsets and lengths;
here a corrupt file ends in `FlatbufferError` and a table that points at itself in a used-up budget.
"""

import struct


class FlatbufferError(ValueError):
    """The bytes are no FlatBuffer of the expected kind."""


class Flatbuffer:
    """Bytes with a budget: as many tables and vector elements may be visited as there are bytes.

    Honest buffers spend at least 4 bytes on each, so only one that refers to the same bytes over
    and over, to keep its reader busy, runs out.
    """

    def __init__(self, data: bytes) -> None:
        """Wrap the bytes of one buffer."""
        self.data = data
        self._budget = len(data)

    def root(self, identifier: bytes) -> "Table":
        """Return the root table; the 4 bytes after the first must be the file identifier."""
        if self.data[4:8] != identifier:
            raise FlatbufferError(f"no {identifier.decode()} mark")
        return Table(self, self.scalar("<I", 0))

    def scalar(self, form: str, position: int) -> int:
        """Unpack one number; FlatbufferError where it lies outside."""
        if not 0 <= position <= len(self.data) - struct.calcsize(form):
            raise FlatbufferError(f"offset {position} lies outside its {len(self.data)} bytes")
        value: int = struct.unpack_from(form, self.data, position)[0]
        return value

    def spend(self, count: int) -> None:
        """Take from the budget."""
        self._budget -= count
        if self._budget < 0:
            raise FlatbufferError("its tables refer to each other without end")


class Table:
    """One table; fields are named by their slot, their place in the schema from 0."""

    def __init__(self, buffer: Flatbuffer, position: int) -> None:
        """Find the table's field offsets."""
        buffer.spend(1)
        self._buffer, self._position = buffer, position
        self._fields = position - buffer.scalar("<i", position)
        self._fields_size = buffer.scalar("<H", self._fields)

    def number(self, slot: int, form: str, default: int = 0) -> int:
        """Return a scalar field, `form` as in `struct` without byte order."""
        position = self.place(slot)
        return default if position is None else self._buffer.scalar(f"<{form}", position)

    def table(self, slot: int) -> "Table | None":
        """Return a sub-table (or a union's value), None where it is absent."""
        position = self._target(slot)
        return None if position is None else Table(self._buffer, position)

    def tables(self, slot: int) -> list["Table"]:
        """Return a vector of tables."""
        start, count = self._vector(slot, 4)
        places = range(start, start + 4 * count, 4)
        return [Table(self._buffer, at + self._buffer.scalar("<I", at)) for at in places]

    def numbers(self, slot: int, form: str) -> tuple[int, ...]:
        """Return a vector of scalars."""
        size = struct.calcsize(f"<{form}")
        start, count = self._vector(slot, size)
        return struct.unpack_from(f"<{count}{form}", self._buffer.data, start)

    def text(self, slot: int) -> str:
        """Return a string, empty where it is absent."""
        start, count = self._vector(slot, 1)
        return self._buffer.data[start : start + count].decode(errors="replace")

    def bytes_span(self, slot: int) -> tuple[int, int]:
        """Return where a vector of bytes lies: position in the buffer, length."""
        return self._vector(slot, 1)

    def place(self, slot: int) -> int | None:
        """Return where a scalar field lies in the buffer, None where its default is left out."""
        place = 4 + 2 * slot
        if place + 2 > self._fields_size:
            return None
        offset = self._buffer.scalar("<H", self._fields + place)
        return self._position + offset if offset else None

    def _target(self, slot: int) -> int | None:
        position = self.place(slot)
        return None if position is None else position + self._buffer.scalar("<I", position)

    def _vector(self, slot: int, item_size: int) -> tuple[int, int]:
        position = self._target(slot)
        if position is None:
            return 0, 0
        start, count = position + 4, self._buffer.scalar("<I", position)
        if start + item_size * count > len(self._buffer.data):
            raise FlatbufferError(f"a vector of {count} items does not fit its buffer")
        # Bytes are handed on as a place or as one string, so they cost nothing to visit.
        self._buffer.spend(count if item_size > 1 else 0)
        return start, count
