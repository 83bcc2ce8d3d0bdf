"""Writes a GGUF, version 3: the head from what is planned, then each tensor as it is made.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing is kept: neither a
tensor in memory nor a copy on disk, as gguf-py's writer would.
"""

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgekit.formats.gguf.file import DEFAULT_ALIGNMENT, MARK, TYPES

Value = bool | int | np.int32 | float | str | Sequence[str] | NDArray[np.int32]
"""A metadata value: a bool, uint32, int32, float32, string, or an array of strings or int32."""

_VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its name, ggml's name of its type, its shape (rows first)."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its data takes, without the padding after it."""
        _, block, block_bytes = TYPES[_NUMBERS[self.type]]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    pieces: Callable[[PlannedTensor], Iterable[NDArray[np.uint8]]],
) -> None:
    """Write a file; `pieces` gives a tensor's bytes in order. OSError where the system refuses.

    Raises ValueError where the pieces are not as long as the tensor.
    """
    with path.open("wb", buffering=0) as file:
        _write(file, _head(metadata, tensors))
        for tensor in tensors:
            _pad(file)
            begin = file.tell()
            for piece in pieces(tensor):
                _write(file, piece.data)
            if file.tell() - begin != tensor.nbytes:
                raise ValueError(f"{tensor.name}: its data are not those of {tensor.type}")
        _pad(file)


def write_hollow_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]
) -> None:
    """Write a file's head, and a hole as long as its tensors: for who reads no weight."""
    with path.open("wb", buffering=0) as file:
        _write(file, _head(metadata, tensors))
        _pad(file)
        padded = sum(each.nbytes + -each.nbytes % DEFAULT_ALIGNMENT for each in tensors)
        file.truncate(file.tell() + padded)


def _head(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> bytes:
    head = [MARK, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    return b"".join([*head, *_infos(tensors)])


def _infos(tensors: Sequence[PlannedTensor]) -> list[bytes]:
    infos, offset = [], 0
    for tensor in tensors:
        axes = tensor.shape[::-1]  # columns first
        infos.append(
            _string(tensor.name)
            + struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
            + struct.pack("<IQ", _NUMBERS[tensor.type], offset)
        )
        offset += tensor.nbytes + -tensor.nbytes % DEFAULT_ALIGNMENT
    return infos


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, np.int32):
        return struct.pack("<Ii", _INT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", _ARRAY, _INT32, value.size)
        return head + value.astype("<i4", casting="safe").tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(file: BinaryIO) -> None:
    _write(file, bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
