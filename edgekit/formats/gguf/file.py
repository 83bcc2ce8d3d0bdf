"""Reads the head of a GGUF that nobody vouches for: what it claims is compared with its size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp refuses in it
(ggml/src/gguf.cpp, gguf_init_from_reader) is refused here too, before its code sees the file: a
wrong number there can end the process. gguf-py makes an object of every element of an array, so a
hostile file of 100 MB takes many GB in it; here an array stays packed until it is asked for.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.common.files import os_reason
from edgekit.errors import EdgekitError

MARK = b"GGUF"
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32

# ggml's types by their number in a file: name, weights in a block, bytes of a block
# (enum ggml_type in ggml.h, the blocks in ggml-common.h). Numbers that are left out were removed.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}

STRING, _BOOL, _ARRAY = 8, 7, 9
SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",  # any byte may stand there, and numpy's bool takes none but 0 and 1
    10: "Q",
    11: "q",
    12: "d",
}
"""Number types of metadata values by their number in a file, as `struct` calls them."""

_VERSIONS = (2, 3)
_UINT32 = 4
_MOST_TENSORS = _MOST_KEYS = 1 << 16
_LONGEST_KEY = (1 << 16) - 1  # the format's own limit
_LONGEST_NAME = 63  # GGML_MAX_NAME less the final 0
_MOST_AXES = 4  # GGML_MAX_DIMS
_MOST_ELEMENTS = 1 << 48
_LARGEST_ALIGNMENT = 1 << 20
_MOST_HEAD_BYTES = 256 << 20  # the largest vocabularies take a tenth of it
_PIECE = 1 << 20
_LENGTH = struct.Struct("<Q")


class _GgufError(ValueError):
    """What is wrong with the bytes, to be said with the file's name before it."""


@dataclass(frozen=True)
class GgufArray:
    """An array of the metadata, still packed: the type of its elements, how many, their bytes."""

    type: int
    count: int
    packed: memoryview

    def raw_strings(self) -> Iterator[bytes]:
        """Yield the elements of an array of strings as they are stored."""
        place = 0
        for _ in range(self.count if self.type == STRING else 0):
            (length,) = _LENGTH.unpack_from(self.packed, place)
            begin = place + _LENGTH.size
            place = begin + length
            yield bytes(self.packed[begin:place])

    def strings(self) -> list[str]:
        """Return the elements of an array of strings; U+FFFD for what is not UTF-8."""
        return [text.decode(errors="replace") for text in self.raw_strings()]

    def numbers(self) -> NDArray[Any]:
        """Return the elements of an array of numbers, without a copy; booleans as bytes."""
        return np.frombuffer(self.packed, np.dtype(f"<{SCALARS[self.type]}"))


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's name, ggml's name of its type, its shape (rows first) and its place in bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of one file; build by `open`.

    metadata  by key: numbers, booleans, texts, and `GgufArray`s
    tensors   by name, in the file's order; their offsets count from the file's start
    """

    path: Path
    version: int
    file_bytes: int
    head_bytes: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Read a file's head; EdgekitError for a foreign, truncated or contradictory one.

        No more of the file is read, and memory is only taken for bytes that are there.
        """
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                cursor = _Cursor(file.read, size)
                return _read_file(path, cursor, size)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
        except _GgufError as error:
            raise EdgekitError(f"{path}: {error}") from error

    def array(self, key: str) -> GgufArray:
        """Return an array of the metadata; EdgekitError where `key` is anything else."""
        found = self.metadata.get(key)
        if not isinstance(found, GgufArray):
            raise EdgekitError(f"{self.path}: its metadata has no array {key}")
        return found

    def data(self, tensor: GgufTensor, begin: int = 0, count: int | None = None) -> bytearray:
        """Read `count` bytes of a tensor from its byte `begin` on, by default to its end."""
        data = bytearray(tensor.nbytes - begin if count is None else count)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(tensor.offset + begin)
                done, view = 0, memoryview(data)
                while done < len(data) and (got := file.readinto(view[done:])):
                    done += got
        except OSError as error:
            raise EdgekitError(f"{self.path}: cannot be read: {os_reason(error)}") from error
        if done < len(data):
            raise EdgekitError(f"{self.path}: was truncated while it was being read")
        return data


def _read_file(path: Path, cursor: "_Cursor", size: int) -> GgufFile:
    version, tensor_count, key_count = _read_counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key", _LONGEST_KEY)
        if not key or key in metadata:
            raise _GgufError(f"has the key {_short(key)} twice" if key else "has an empty key")
        kind = cursor.number("I")
        if key == ALIGNMENT_KEY and kind != _UINT32:
            raise _GgufError(f"its {ALIGNMENT_KEY} is not of type uint32")
        metadata[key] = cursor.value(key, kind)
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    return GgufFile(
        path=path,
        version=version,
        file_bytes=size,
        head_bytes=cursor.position,
        metadata=metadata,
        tensors=_place(infos, cursor.position, _alignment(metadata), size),
    )


def _read_counts(cursor: "_Cursor") -> tuple[int, int, int]:
    if cursor.take(len(MARK), "its mark") != MARK:
        raise _GgufError("is not a GGUF file")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise _GgufError("is a big-endian GGUF; only little-endian ones are supported")
    if version not in _VERSIONS:
        raise _GgufError(f"has GGUF version {version}; supported are {_VERSIONS[0]} and 3")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    for what, count, most in (("tensors", tensors, _MOST_TENSORS), ("keys", keys, _MOST_KEYS)):
        if count > most:
            raise _GgufError(f"claims to hold {count} {what}; more than {most} are not supported")
    return version, tensors, keys


def _read_info(cursor: "_Cursor") -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text("a tensor's name", _LONGEST_NAME)
    axes = cursor.number("I")
    if not 1 <= axes <= _MOST_AXES:
        raise _GgufError(f"tensor {_short(name)} has {axes} axes; allowed are 1 to {_MOST_AXES}")
    # the file names the columns first
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = int(metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
    if not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise _GgufError(f"its {ALIGNMENT_KEY} is {alignment}, no power of two up to 2^20")
    return alignment


def _place(
    infos: list[tuple[str, int, tuple[int, ...], int]], end: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """Check the tensors one by one: the format has them in order, without holes or overlaps."""
    tensors: dict[str, GgufTensor] = {}
    base = _padded(end, alignment)
    expected = 0
    for name, kind, shape, offset in infos:
        if name in tensors:
            raise _GgufError(f"has the tensor {_short(name)} twice")
        if offset != expected:
            raise _GgufError(
                f"tensor {_short(name)} lies at offset {offset}, not at {expected}, where the "
                "tensor before it ends"
            )
        tensor = _tensor(name, kind, shape, base + offset)
        if tensor.offset + tensor.nbytes > size:
            raise _GgufError(
                f"is truncated: tensor {_short(name)} ends at byte "
                f"{tensor.offset + tensor.nbytes} of {size}"
            )
        tensors[name] = tensor
        expected += _padded(tensor.nbytes, alignment)
    return tensors


def _tensor(name: str, kind: int, shape: tuple[int, ...], offset: int) -> GgufTensor:
    if kind not in TYPES:
        raise _GgufError(f"tensor {_short(name)} has the unknown type {kind}")
    stored, block, block_bytes = TYPES[kind]
    if 0 in shape or math.prod(shape) > _MOST_ELEMENTS:
        raise _GgufError(f"tensor {_short(name)} has the impossible shape {list(shape)}")
    if shape[-1] % block:
        raise _GgufError(
            f"tensor {_short(name)} has rows of {shape[-1]} weights; {stored} has blocks of {block}"
        )
    return GgufTensor(name, stored, shape, offset, math.prod(shape) // block * block_bytes)


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _short(text: str) -> str:
    """Show a name from a file on one short printable line."""
    return text if text.isprintable() and 0 < len(text) <= 80 else repr(text)[:80]


class _Cursor:
    """A position in a file that is read in pieces, as far as it is asked for and no further."""

    def __init__(self, read: Any, size: int) -> None:  # noqa: ANN401 - a binary file's `read`
        self._read, self._size = read, size
        self._buffer = bytearray()
        self.position = 0

    def number(self, form: str) -> Any:  # noqa: ANN401 - an int or a float, as `form` says
        begin = self._advance(struct.calcsize(f"<{form}"), "a number")
        return struct.unpack_from(f"<{form}", self._buffer, begin)[0]

    def take(self, count: int, what: str) -> bytes:
        begin = self._advance(count, what)
        return bytes(self._buffer[begin : self.position])

    def text(self, what: str, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise _GgufError(f"{what} has {length} bytes; allowed are {longest}")
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise _GgufError(f"{what} at byte {self.position - length} is not UTF-8") from error

    def value(self, key: str, kind: int) -> Any:  # noqa: ANN401 - whatever the file holds
        if kind == STRING:
            return self.take(self.number("Q"), _short(key)).decode(errors="replace")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in SCALARS:
            raise _GgufError(f"its {_short(key)} has the unknown type {kind}")
        value = self.number(SCALARS[kind])
        return value != 0 if kind == _BOOL else value

    def _array(self, key: str) -> GgufArray:
        kind, count = self.number("I"), self.number("Q")
        begin = self.position
        if kind == STRING:
            self._pass_strings(count, key)
        elif kind in SCALARS:
            self._advance(count * struct.calcsize(f"<{SCALARS[kind]}"), _short(key))
        else:
            raise _GgufError(f"its {_short(key)} is an array of the unsupported type {kind}")
        return GgufArray(kind, count, memoryview(bytes(self._buffer[begin : self.position])))

    def _pass_strings(self, count: int, key: str) -> None:
        if count > (self._size - self.position) // _LENGTH.size:
            raise self._beyond(_short(key), count * _LENGTH.size)
        read_length, buffer = _LENGTH.unpack_from, self._buffer
        place = self.position
        for _ in range(count):
            if place + _LENGTH.size > len(buffer):
                self._fill(place + _LENGTH.size, _short(key))
            place += _LENGTH.size + read_length(buffer, place)[0]
            if place > len(buffer):
                self._fill(place, _short(key))
        self.position = place

    def _advance(self, count: int, what: str) -> int:
        begin = self.position
        if begin + count > len(self._buffer):
            self._fill(begin + count, what)
        self.position = begin + count
        return begin

    def _fill(self, end: int, what: str) -> None:
        """Read on until the buffer reaches `end`."""
        if end > self._size:
            raise self._beyond(what, end - self.position)
        if end > _MOST_HEAD_BYTES:
            raise _GgufError(f"its metadata takes more than {_MOST_HEAD_BYTES >> 20} MiB")
        while len(self._buffer) < end:
            piece = self._read(max(_PIECE, end - len(self._buffer)))
            if not piece:
                raise _GgufError("was truncated while it was being read")
            self._buffer += piece

    def _beyond(self, what: str, count: int) -> _GgufError:
        return _GgufError(
            f"is truncated or damaged: {what} at byte {self.position} needs {count} more, the "
            f"file has {self._size}"
        )
