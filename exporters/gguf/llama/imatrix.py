"""Importance matrices: the mean square of every linear's inputs, as llama.cpp's tools store them.

`llama-imatrix` sums the squares of each input channel over a text; `llama-quantize --imatrix` gives
channels of large inputs the smaller errors. The GGUF form and the older binary one (.dat) are read
as in llama.cpp's common/imatrix-loader.cpp, and the GGUF form is written as in
tools/imatrix/imatrix.cpp.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekit.common.files import new_file, refuse_irregular
from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import MARK, STRING, GgufFile
from edgekit.formats.gguf.writer import PlannedTensor, Value, write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KIND, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
# Beyond these llama.cpp's searches for scales overflow, and it writes noise without a word.
_SMALLEST, _LARGEST = 1e-20, 1e20
_BLOCK = 32  # columns that share a scale, in every type
_MOST_BYTES = 256 << 20  # three times what the largest public models need


@dataclass(frozen=True)
class Statistics:
    """Of one matrix: `sums` float32 `[columns]` of squared inputs, over `count` tokens.

    In an old binary file the count is that of chunks, and the sums are scaled to match.
    """

    sums: NDArray[np.float32]
    count: int

    def means(self) -> NDArray[np.float32]:
        """Return the mean square of each column's input, rounded as llama.cpp rounds it."""
        return self.sums / np.float32(self.count)


@dataclass(frozen=True)
class Imatrix:
    """The statistics of a model's matrices by GGUF name, and what they were computed from.

    `datasets` are the names of texts, the chunks runs of `chunk_size` tokens (0: not told).
    """

    entries: dict[str, Statistics]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    @classmethod
    def load(cls, path: Path) -> "Imatrix":
        """Read a file of either form; EdgekitError for a damaged, foreign or empty one.

        Sums are finite and not negative, counts at least 1.
        """
        refuse_irregular(path)
        mark, size = _beginning(path)
        if size > _MOST_BYTES:
            raise EdgekitError(f"{path}: has {size} bytes; no imatrix has more than {_MOST_BYTES}")
        found = _read_gguf(path) if mark == MARK else _read_binary(path)
        if not found.entries:
            raise EdgekitError(f"{path}: holds no statistics")
        for name, entry in found.entries.items():
            _check(path, name, entry)
        return found

    def save(self, path: Path) -> None:
        """Write the GGUF form; an existing file is replaced."""
        metadata: dict[str, Value] = {
            _KIND: "imatrix",
            _DATASETS: self.datasets,
            _CHUNKS: self.chunk_count,
            _CHUNK_SIZE: self.chunk_size,
        }
        values = dict[str, NDArray[np.float32]]()
        for name, entry in sorted(self.entries.items()):
            values[name + _SUMS] = entry.sums
            values[name + _COUNTS] = np.array([entry.count], np.float32)
        planned = [PlannedTensor(name, "F32", each.shape) for name, each in values.items()]
        with new_file(path) as partial:
            write_gguf(partial, metadata, planned, lambda one: [values[one.name].view(np.uint8)])

    def check_model(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse statistics that are not those of a model's matrices.

        `shapes` are the model's tensors by GGUF name, `path` is what messages call the imatrix.
        Every matrix of a layer must have an entry: where one is missing llama.cpp would quietly
        quantize without.
        """
        for name, entry in self.entries.items():
            if name not in shapes:
                raise EdgekitError(
                    f"{path}: is of another model: {name!r:.80} is none of this model's tensors"
                )
            if shapes[name][-1] != entry.sums.size:
                raise EdgekitError(
                    f"{path}: is of another model: {entry.sums.size} values for {name}, "
                    f"which has {shapes[name][-1]} columns"
                )
        missing = [
            name for name in shapes if is_measured(name, shapes) and name not in self.entries
        ]
        if missing:
            raise EdgekitError(
                f"{path}: holds nothing about {missing[0]} and {len(missing) - 1} other matrices "
                "of the model"
            )


def is_measured(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether llama-imatrix measures a tensor: a layer's matrices, neither table nor head."""
    return name.startswith("blk.") and len(shapes[name]) == 2 and not name.endswith(".conv.weight")


def _beginning(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            return file.read(len(MARK)), path.stat().st_size
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error


def _check(path: Path, name: str, entry: Statistics) -> None:
    if entry.count < 1:
        raise EdgekitError(f"{path}: {name!r:.80} was computed from {entry.count} tokens")
    if not np.isfinite(entry.sums).all() or (entry.sums < 0).any():
        raise EdgekitError(f"{path}: {name!r:.80} holds values that are no sums of squares")
    largest = entry.means().max(initial=0)
    if not _SMALLEST < largest < _LARGEST:
        raise EdgekitError(f"{path}: {name!r:.80} has means up to {largest:.3g}: no model has such")
    blocks = entry.sums[: entry.sums.size // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    silent = np.flatnonzero(~blocks.any(axis=1))
    if silent.size:
        begin = _BLOCK * int(silent[0])
        raise EdgekitError(
            f"{path}: {name!r:.80} holds zeros only for the columns {begin} to "
            f"{begin + _BLOCK - 1}: llama.cpp would store their weights as noise"
        )


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile.open(path)
    kind = file.metadata.get(_KIND)
    if kind != "imatrix":
        raise EdgekitError(f"{path}: is no imatrix: its general.type is {kind!r:.80}")
    for key in (_CHUNKS, _CHUNK_SIZE):
        if type(file.metadata.get(key)) is not int:
            raise EdgekitError(f"{path}: holds no number {key}")
    entries = {}
    for name in file.tensors:
        stem = name.removesuffix(_SUMS).removesuffix(_COUNTS)
        if stem == name or stem + _SUMS not in file.tensors or stem + _COUNTS not in file.tensors:
            raise EdgekitError(f"{path}: {name!r:.80} is no pair of {_SUMS} and {_COUNTS}")
        if name.endswith(_SUMS):
            sums, counts = _floats(file, name), _floats(file, stem + _COUNTS)
            entries[stem] = Statistics(sums, _count(path, stem, counts))
    return Imatrix(
        entries,
        tuple(_datasets(file)),
        file.metadata[_CHUNKS],
        file.metadata[_CHUNK_SIZE],
    )


def _datasets(file: GgufFile) -> list[str]:
    array = file.array(_DATASETS)
    if array.type != STRING:
        raise EdgekitError(f"{file.path}: its {_DATASETS} are no texts")
    return array.strings()


def _floats(file: GgufFile, name: str) -> NDArray[np.float32]:
    tensor = file.tensors[name]
    if tensor.type != "F32":
        raise EdgekitError(f"{file.path}: {name!r:.80} is {tensor.type}, not F32")
    return np.frombuffer(file.data(tensor), np.float32)


def _count(path: Path, name: str, counts: NDArray[np.float32]) -> int:
    if counts.size != 1:
        raise EdgekitError(
            f"{path}: {name!r:.80} has {counts.size} counts, so it is of a mixture of experts"
        )
    # beyond the integers that float32 holds a count is none
    return int(np.rint(counts[0])) if 0 <= counts[0] < 2**53 else -1


def _read_binary(path: Path) -> Imatrix:
    data, entries = path.read_bytes(), dict[str, Statistics]()
    cursor = _Binary(path, data)
    for _ in range(cursor.number()):
        name, count = cursor.text(), cursor.number()
        entries[name] = Statistics(cursor.floats(cursor.number()), count)
    chunks = cursor.number() if cursor.left else 0
    datasets = (cursor.text(),) if cursor.left else ()
    return Imatrix(entries, datasets, chunks, 0)


class _Binary:
    """The old form: native 32-bit numbers, lengths before texts and lists."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._position = path, data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def number(self) -> int:
        value: int = struct.unpack("<i", self._take(4))[0]
        return value

    def text(self) -> str:
        try:
            return self._take(self.number()).decode()
        except UnicodeDecodeError as error:
            raise self._foreign() from error

    def floats(self, count: int) -> NDArray[np.float32]:
        return np.frombuffer(self._take(4 * count), np.float32)

    def _take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise self._foreign()
        self._position += count
        return self._data[self._position - count : self._position]

    def _foreign(self) -> EdgekitError:
        return EdgekitError(f"{self._path}: is no imatrix, or is damaged at byte {self._position}")
