"""Weights of a folder in Hugging Face layout, read one tensor at a time.

The safetensors header (https://github.com/huggingface/safetensors#format) is parsed here and
tensors are read by `preadv` into memory of their own: a memory-mapped file would count, page by
page, in the peak memory (VmHWM) that an export promises to bound.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch

from edgekit.common.files import load_json_object, refuse_irregular, sha256_of, stand_in
from edgekit.errors import EdgekitError, one_line
from edgekit.models.config import ModelConfig
from edgekit.models.kinds import folder_without_weights

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PACKED = ("I8", "U8", "I16", "I32", "I64", "F8_E4M3", "F8_E5M2", "F4")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 8
_PIECE = 1 << 20


class WeightSource(Protocol):
    """Where an export takes its weights from: a checkpoint on disk, or random ones."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, in a memory of its own, in the dtype it is stored in."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""
        ...

    def sha256(self) -> str:
        """Return a hexadecimal digest that identifies the weights."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: file, dtype, shape, byte offset from the file's start, bytes."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model, in one safetensors file or several; build by `open`."""

    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the headers of a folder's safetensors; refuse a corrupt or truncated file."""
        if (folder / SINGLE_FILE).is_file():
            file = folder / SINGLE_FILE
            return cls((file,), read_header(file))
        if (folder / INDEX_FILE).is_file():
            return _open_sharded(folder)
        wanted = f"no {SINGLE_FILE} and no {INDEX_FILE}"
        raise EdgekitError(f"{folder}: {folder_without_weights(folder, wanted)}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every stored tensor by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as stored; refuse NaN and infinities by the tensor's name."""
        return read_tensor(name, self._entry(name))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in."""
        return self._entry(name).dtype

    def validate(self, config: ModelConfig) -> None:
        """Refuse missing, extra and mis-shaped tensors in one line that names them.

        A tied model may still ship `lm_head.weight` if it repeats the embedding bit for bit.
        """
        expected, stored = config.tensor_shapes(), self.shapes()
        if config.tie_embeddings and "lm_head.weight" in stored.keys() - expected.keys():
            self._check_tied_head()
            stored.pop("lm_head.weight")
        found = shape_problems(expected, stored)
        if found:
            raise EdgekitError(f"{self.files[0].parent}: does not fit its config.json: {found}")

    def sha256(self) -> str:
        """Digest of the weights: of the file, or, of several, of their joined binary digests.

        The files are taken in the order of their names.
        """
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        # An export asks several times, and gigabytes take seconds.
        digests = [_digest(path) for path in self.files]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            folder = self.files[0].parent
            raise EdgekitError(f"{folder}: the checkpoint has no tensor {name}") from None

    def _check_tied_head(self) -> None:
        head, embedding = self._entry("lm_head.weight"), self._entry("model.embed_tokens.weight")
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and all(
            left == right for left, right in zip(_pieces(head), _pieces(embedding), strict=True)
        )
        if not same:
            raise EdgekitError(
                f"{head.path}: tensor lm_head.weight differs from model.embed_tokens.weight "
                "although config.json ties them (tie_word_embeddings)"
            )


def read_tensor(name: str, entry: TensorEntry) -> torch.Tensor:
    """Read one tensor as stored; refuse NaN and infinities by the tensor's name."""
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    _read_into(entry, memoryview(data.numpy().data))
    tensor = data.view(entry.dtype).view(entry.shape)
    # aminmax passes NaN on and needs no temporary, unlike isfinite over the whole tensor
    if tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
        raise EdgekitError(f"{entry.path}: tensor {name} holds NaN or infinite values")
    return tensor


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse a safetensors header strictly: spans in bounds, gapless, and of their shape's size."""
    return read_header_and_metadata(path, FLOAT_DTYPES)[0]


def read_header_and_metadata(
    path: Path, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Do what `read_header` does for tensors of some dtypes, and return the metadata too."""
    refuse_irregular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                what = stand_in(path) or "truncated, or not a safetensors file"
                raise EdgekitError(f"{path}: {what}")
            raw = _parse_header(path, file.read(length))
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
    metadata = _checked_metadata(path, raw.pop("__metadata__", {}))
    start = 8 + length
    entries = {name: _entry(path, name, info, start, dtypes) for name, info in raw.items()}
    _check_coverage(path, entries, start, size)
    return entries, metadata


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        header = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = one_line(error, 120)
        raise EdgekitError(f"{path}: corrupt safetensors header: {reason}") from error
    if not isinstance(header, dict):
        raise EdgekitError(f"{path}: corrupt safetensors header: not an object")
    return header


def _checked_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise EdgekitError(f"{path}: corrupt safetensors header: __metadata__ must hold strings")
    return metadata


def _entry(
    path: Path, name: str, info: object, start: int, dtypes: Mapping[str, torch.dtype]
) -> TensorEntry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise EdgekitError(
            f"{path}: tensor {_short(name)}: needs dtype, shape and data_offsets in the header"
        )
    dtype = dtypes.get(info["dtype"]) if isinstance(info["dtype"], str) else None
    if dtype is None:
        raise EdgekitError(
            f"{path}: tensor {_short(name)} has dtype {_short(info['dtype'])}; "
            f"supported: {', '.join(dtypes)}{_quantized(info['dtype'])}"
        )
    shape, offsets = info["shape"], info["data_offsets"]
    if not _naturals(shape) or len(shape) > _MAX_DIMS:
        raise EdgekitError(f"{path}: tensor {_short(name)} has an impossible shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise EdgekitError(f"{path}: tensor {_short(name)} has impossible data_offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise EdgekitError(
            f"{path}: tensor {_short(name)}: its data_offsets do not span its shape and dtype"
        )
    return TensorEntry(path, dtype, tuple(shape), start + begin, end - begin)


def _quantized(dtype: object) -> str:
    """Return what a type says that floats are not stored in."""
    packed = isinstance(dtype, str) and dtype in _PACKED
    return (
        "; such are weights that are already quantized (GPTQ, AWQ, bitsandbytes, fp8): give the "
        "original checkpoint"
        if packed
        else ""
    )


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _check_coverage(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor: the format forbids holes."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != position:
            raise EdgekitError(f"{path}: tensor {_short(name)} overlaps another or leaves a gap")
        position += entry.nbytes
        if position > size:
            raise EdgekitError(
                f"{path}: truncated: tensor {_short(name)} ends at byte {position} of {size}"
            )
    if position != size:
        raise EdgekitError(f"{path}: {size - position} bytes follow the last tensor")


def _open_sharded(folder: Path) -> Checkpoint:
    index = folder / INDEX_FILE
    places = load_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise EdgekitError(f"{index}: weight_map is missing or empty")
    shards = {_shard_path(folder, index, place): place for place in places.values()}
    missing = sorted(path.name for path in shards if not path.exists())
    if missing:
        found = _listing(f"of {len(shards)} shards missing", missing)
        raise EdgekitError(f"{folder}: {found}: download them again")
    entries = dict[str, TensorEntry]()
    for path in sorted(shards):
        header = read_header(path)
        for name in header:
            if places.get(name) != path.name:
                raise EdgekitError(f"{index}: does not place tensor {_short(name)} in {path.name}")
        entries |= header
    absent = [name for name in places if name not in entries]
    if absent:
        raise EdgekitError(f"{folder}: {_listing('missing from its shard', absent)}")
    return Checkpoint(tuple(sorted(shards)), entries)


def _shard_path(folder: Path, index: Path, place: object) -> Path:
    """Join a shard's name; judged as text, because the hub's cache links files to elsewhere."""
    if (
        isinstance(place, str)
        and place.endswith(".safetensors")
        and place.isprintable()
        and not set(place) & set("/\\:")
    ):
        return folder / place
    raise EdgekitError(f"{index}: {_short(place)} is not the plain name of a safetensors file")


def _read_into(entry: TensorEntry, target: memoryview) -> None:
    try:
        with entry.path.open("rb") as file:
            done = 0
            while done < entry.nbytes:
                count = os.preadv(file.fileno(), [target[done:]], entry.offset + done)
                if count == 0:
                    raise EdgekitError(f"{entry.path}: truncated while it was being read")
                done += count
    except OSError as error:
        raise EdgekitError(f"{entry.path}: cannot be read: {error.strerror}") from error


def _pieces(entry: TensorEntry) -> Iterator[bytes]:
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left and (piece := file.read(min(_PIECE, left))):
            left -= len(piece)
            yield piece


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error


def shape_problems(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> str:
    """Say which tensors are missing, extra and mis-shaped; nothing where all is as expected."""
    problems = [
        _listing("missing", [name for name in expected if name not in stored]),
        _listing("unexpected", [name for name in stored if name not in expected]),
        _listing("of the wrong shape", _misshapen(expected, stored)),
    ]
    return "; ".join(problem for problem in problems if problem)


def _misshapen(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> list[str]:
    return [
        f"{name} (is {list(stored[name])}, should be {list(shape)})"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]


def _listing(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(_short(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}: {shown}"


def _short(value: object) -> str:
    """Show a name from a file on one short printable line."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
