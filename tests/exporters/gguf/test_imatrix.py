"""Importance matrices: what is written and read back, and files that are refused with one line."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.llama.imatrix import Imatrix, Statistics

A, B = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
SHAPES = {A: (8, 4), B: (4, 8), "blk.0.attn_norm.weight": (4,), "token_embd.weight": (16, 4)}


def example() -> Imatrix:
    sums = np.arange(1, 5, dtype=np.float32)
    return Imatrix(
        {A: Statistics(sums, 1024), B: Statistics(np.full(8, 0.1, np.float32), 1024)},
        ("stories.txt", "code.txt"),
        2,
        512,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "imatrix.gguf"
    example().save(path)
    return path


def assert_same(found: Imatrix, expected: Imatrix) -> None:
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert found.entries[name].count == entry.count
    assert (found.datasets, found.chunk_count) == (expected.datasets, expected.chunk_count)


def test_what_is_written_is_read(file: Path) -> None:
    found = Imatrix.load(file)
    assert_same(found, example())
    assert found.chunk_size == 512


def test_the_file_is_laid_out_as_llama_imatrix_lays_it_out(file: Path) -> None:
    """Keys and tensors of tools/imatrix/imatrix.cpp, in its order, as gguf-py reads them."""
    reader = gguf.GGUFReader(file)
    fields = [(name, each.contents()) for name, each in reader.fields.items()][3:]
    assert fields == [
        ("general.type", "imatrix"),
        ("imatrix.datasets", ["stories.txt", "code.txt"]),
        ("imatrix.chunk_count", 2),
        ("imatrix.chunk_size", 512),
    ]
    tensors = [(each.name, each.data.tolist()) for each in reader.tensors]
    assert tensors == [
        (f"{B}.in_sum2", [np.float32(0.1)] * 8),
        (f"{B}.counts", [1024]),
        (f"{A}.in_sum2", [1, 2, 3, 4]),
        (f"{A}.counts", [1024]),
    ]
    assert {each.tensor_type.name for each in reader.tensors} == {"F32"}


def test_means_are_rounded_once_to_float32() -> None:
    entry = Statistics(np.array([1, 1e-3, 3e8], np.float32), 3)
    expected = [np.float32(1) / np.float32(3), np.float32(1e-3) / np.float32(3), np.float32(1e8)]
    assert entry.means().tolist() == [float(value) for value in expected]


def old_form(entries: dict[str, list[float]], calls: int, tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, values in entries.items():
        parts.append(struct.pack("<i", len(name)) + name.encode())
        parts.append(struct.pack(f"<ii{len(values)}f", calls, len(values), *values))
    return b"".join(parts) + tail


def test_the_old_binary_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    tail = struct.pack("<ii", 7, 5) + b"a.txt"
    path.write_bytes(old_form({A: [2, 4, 6, 8]}, 2, tail))
    found = Imatrix.load(path)
    assert found.entries[A].means().tolist() == [1, 2, 3, 4]
    assert (found.datasets, found.chunk_count) == (("a.txt",), 7)
    path.write_bytes(old_form({A: [2, 4, 6, 8]}, 2))  # older still: nothing at the end
    assert (Imatrix.load(path).datasets, Imatrix.load(path).chunk_count) == ((), 0)


def test_the_model_it_is_of_accepts_it(file: Path) -> None:
    example().check_model(file, SHAPES)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({B: (4, 8)}, f"another model: {A!r} is none of this model's tensors"),
        (SHAPES | {A: (8, 5)}, f"another model: 4 values for {A}, which has 5 columns"),
        (SHAPES | {"blk.1.attn_q.weight": (4, 4)}, "nothing about blk.1.attn_q.weight"),
    ],
)
def test_another_model_refuses_it(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(EdgekitError, match=f"i.gguf: .*{message}"):
        example().check_model(Path("i.gguf"), shapes)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write any GGUF; `metadata` None leaves a key out."""
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


KEYS: dict[str, Any] = {
    "general.type": "imatrix",
    "imatrix.datasets": ["a"],
    "imatrix.chunk_count": 1,
    "imatrix.chunk_size": 512,
}
ONE = {f"{A}.in_sum2": np.ones(4, np.float32), f"{A}.counts": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"general.type": "model"}, {}, "is no imatrix: its general.type is 'model'"),
        ({"general.type": None}, {}, "is no imatrix: its general.type is None"),
        ({"imatrix.datasets": None}, {}, "has no array imatrix.datasets"),
        ({"imatrix.datasets": [1, 2]}, {}, "its imatrix.datasets are no texts"),
        ({"imatrix.chunk_count": None}, {}, "holds no number imatrix.chunk_count"),
        ({"imatrix.chunk_size": "512"}, {}, "holds no number imatrix.chunk_size"),
        ({}, {"other": np.ones(1, np.float32)}, "'other' is no pair"),
        ({}, {"x.in_sum2": np.ones(1, np.float32)}, "'x.in_sum2' is no pair"),
        ({}, {f"{A}.in_sum2": np.ones(4, np.float16)}, "is F16, not F32"),
        ({}, {f"{A}.in_sum2": np.array([1, 2, np.nan, 4], np.float32)}, "no sums of squares"),
        ({}, {f"{A}.in_sum2": np.array([1, 2, np.inf, 4], np.float32)}, "no sums of squares"),
        ({}, {f"{A}.in_sum2": np.array([1, 2, -3, 4], np.float32)}, "no sums of squares"),
        ({}, {f"{A}.in_sum2": np.zeros(4, np.float32)}, "has means up to 0: no model has such"),
        ({}, {f"{A}.in_sum2": np.full(4, 1e-42, np.float32)}, "has means up to 1e-42"),
        ({}, {f"{A}.in_sum2": np.full(4, 3e38, np.float32)}, r"has means up to 3e\+38"),
        ({}, {f"{A}.in_sum2": np.arange(96, dtype=np.float32) // 32 % 2}, "the columns 0 to 31"),
        ({}, {f"{A}.counts": np.zeros(1, np.float32)}, "was computed from 0 tokens"),
        ({}, {f"{A}.counts": np.array([-5], np.float32)}, "was computed from -1 tokens"),
        ({}, {f"{A}.counts": np.array([np.nan], np.float32)}, "was computed from -1 tokens"),
        ({}, {f"{A}.counts": np.array([np.inf], np.float32)}, "was computed from -1 tokens"),
        ({}, {f"{A}.counts": np.ones(3, np.float32)}, "3 counts, so it is of a mixture of exp"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    path = tmp_path / "i.gguf"
    write(path, KEYS | keys, ONE | tensors)
    with pytest.raises(EdgekitError, match=f"i.gguf: .*{message}"):
        Imatrix.load(path)


def test_a_file_without_statistics_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "i.gguf", KEYS, {})
    with pytest.raises(EdgekitError, match="holds no statistics"):
        Imatrix.load(tmp_path / "i.gguf")


def head(tensors: int, values: int, *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(rest)


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def info(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = (1 << 63) - 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        head(0, HUGE),
        head(HUGE, 0),
        head(0, 1, string(b"k", HUGE)),
        head(0, 1, string(b"k"), struct.pack("<IIQ", 9, 8, HUGE)),
        head(0, 2, *[string(b"k"), struct.pack("<II", 4, 0)] * 2),
        head(2, 0, *[info(b"t", (8,))] * 2, bytes(64)),
        head(1, 0, info(b"t", (HUGE, HUGE, HUGE))),
        head(1, 0, info(b"t", (8,), offset=HUGE)),
        struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii", 1, -1),
        struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 30),
        struct.pack("<ii1sii", 1, 1, b"\xff", 1, 1),
        b"this is no imatrix, but a text about one",
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(content)
    with pytest.raises(EdgekitError) as caught:
        Imatrix.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_every_truncation_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in range(len(whole) - 28):  # the last number has that much padding after it
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(EdgekitError):
            Imatrix.load(tmp_path / "cut")


@pytest.mark.parametrize("make", [lambda: None, lambda: old_form({A: [1, 2]}, 1)])
def test_damaged_bytes_end_in_one_line_or_in_numbers(
    file: Path, tmp_path: Path, make: Callable[[], bytes | None]
) -> None:
    whole = make() or file.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            found = Imatrix.load(tmp_path / "damaged")
        except EdgekitError:
            refused += 1
        else:
            assert all(np.isfinite(each.means()).all() for each in found.entries.values())
    assert 100 < refused < 500


def test_a_file_that_is_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(EdgekitError, match="has 1099511627776 bytes; no imatrix has more"):
        Imatrix.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="i.gguf: cannot be read: No such file"):
        Imatrix.load(tmp_path / "i.gguf")


def test_what_is_no_regular_file_is_not_read() -> None:
    with pytest.raises(EdgekitError, match="/dev/zero: is no regular file"):
        Imatrix.load(Path("/dev/zero"))
