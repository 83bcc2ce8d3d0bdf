"""GGUF files by hand, byte by byte: what a writer would never write included."""

import struct

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, packed: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + packed


def info(name: str, axes: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def gguf(
    keys: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    mark: bytes = b"GGUF",
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    counts = (
        len(infos) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = mark + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *infos])
    return head + bytes(-len(head) % 32) + data
