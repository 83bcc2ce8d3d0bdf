"""A file of codes as the source of an export: its head is checked, its tensors read one at a time.

`edgekit.quantize.storage` says what such a file holds; it is written by `edgekit quantize` and by
whatever else ends in codes. Nothing is quantized again: what does not fit is refused.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekit.common.files import check_file
from edgekit.errors import EdgekitError, one_line
from edgekit.models.checkpoint import (
    FLOAT_DTYPES,
    TensorEntry,
    read_header_and_metadata,
    read_tensor,
    shape_problems,
)
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import grid_of
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.scales import SCALES, ScaleGrid
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.made_elsewhere import scheme_of
from edgekit.quantize.schemes.names import FORMS, Scheme
from edgekit.quantize.storage import PARTS, About, build_tensor, check_entry, read_document
from edgekit.quantize.tensor import QuantizedTensor, Weight

_MAX_CODEBOOK = 1 << 20
_DTYPES = {**FLOAT_DTYPES, "I8": torch.int8, "U8": torch.uint8}
_Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CodesFile(Mapping[str, Weight]):
    """The tensors of one model, codes or floats, read when they are asked for.

    table  of the model's tensors; no range is known, and a head is tied where it has the
           embedding's codes
    about  where the codes come from
    """

    path: Path
    about: About
    table: Table
    _entries: Mapping[str, Mapping[str, Any]]
    _places: Mapping[str, str]
    _arrays: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path, config: ModelConfig) -> "CodesFile":
        """Read a file's head; EdgekitError where it holds no codes of the model of `config`.

        What is refused: tensors that are missing, unexpected or of another shape, and codes of no
        `Scheme`. Codes and scales themselves are checked when they are read.
        """
        check_file(path, "; `edgekit quantize` makes one")
        arrays, metadata = read_header_and_metadata(path, _DTYPES)
        document = read_document(path, metadata)
        if document.about is None:
            raise EdgekitError(
                f"{path}: does not say which model it was made of: give save_quantized an About, "
                "or quantize again"
            )
        entries, places = _entries(path, document.entries)
        shapes, may_tie = config.tied_shapes()
        stored = _stored_shapes(path, entries, places, arrays)
        if HEAD in may_tie and HEAD not in stored and EMBEDDING in stored:
            stored[HEAD], places[HEAD] = stored[EMBEDDING], places.get(EMBEDDING, EMBEDDING)
        problems = shape_problems(shapes, stored)
        if problems:
            raise EdgekitError(f"{path}: holds no codes of this model: {problems}")
        rows = tuple(
            _row(path, name, shape, places.get(name, name), entries, arrays)
            for name, shape in shapes.items()
        )
        shared = places.get(HEAD, HEAD) == places.get(EMBEDDING, EMBEDDING)
        tied = {HEAD: EMBEDDING} if shared else {}
        return cls(path, document.about, Table(rows, tied), entries, places, arrays)

    def __getitem__(self, name: str) -> Weight:
        """Read one tensor; EdgekitError where its codes or scales are none of its scheme's."""
        if name not in self:
            raise KeyError(name)
        place = self._places.get(name, name)
        entry = self._entries.get(place)
        if entry is None:
            return read_tensor(place, self._arrays[place])
        parts = {part: self._part(f"{place}.{part}") for part in PARTS}
        try:
            tensor = build_tensor(entry, parts)
            _check_storable(tensor, _scheme(place, entry, self._arrays))
        except (ValueError, RuntimeError) as error:
            raise EdgekitError(f"{self.path}: {name}: {one_line(error)}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        """Return whether the model has such a tensor, reading nothing."""
        return any(row.tensor == name for row in self.table)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a float tensor."""
        return self._arrays[self._places.get(name, name)].dtype

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in model order."""
        return (row.tensor for row in self.table)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.table)

    def _part(self, key: str) -> Tensor | None:
        entry = self._arrays.get(key)
        return None if entry is None else read_tensor(key, entry)


def _entries(
    path: Path, document: Mapping[str, object]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Return the quantized tensors' metadata, and the names of those that are others' objects."""
    entries: dict[str, Mapping[str, Any]] = {}
    places: dict[str, str] = {}
    for name, value in document.items():
        try:
            entry = check_entry(value)
        except ValueError as error:
            raise EdgekitError(f"{path}: {name!r:.120}: {one_line(error)}") from error
        if "same_as" in entry:
            places[name] = entry["same_as"]
        else:
            entries[name] = entry
    return entries, places


def _stored_shapes(
    path: Path,
    entries: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, str],
    arrays: Mapping[str, TensorEntry],
) -> dict[str, _Shape]:
    """Return every tensor's shape by name; parts that belong to no tensor count as tensors."""
    parts = {f"{name}.{part}" for name in entries for part in PARTS}
    shapes = {name: array.shape for name, array in arrays.items() if name not in parts}
    shapes |= {name: tuple(entry["shape"]) for name, entry in entries.items()}
    for name, place in places.items():
        if place not in shapes or place in places or name in shapes:
            raise EdgekitError(
                f"{path}: {name!r:.120} is said to be {place!r:.120}, which is not there"
            )
    return shapes | {name: shapes[place] for name, place in places.items()}


def _row(
    path: Path,
    name: str,
    shape: _Shape,
    place: str,
    entries: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, TensorEntry],
) -> Resolved:
    entry = entries.get(place)
    if entry is None:
        if not arrays[place].dtype.is_floating_point:
            raise EdgekitError(f"{path}: {name}: is stored as integers, but not as codes")
        return Resolved(name, FLOAT, None, shape, FLOAT.nbytes(shape))
    try:
        if len(shape) != 2:
            raise ValueError("codes of what is no matrix")
        scheme = _scheme(place, entry, arrays)
        scheme.check_shape(shape)
    except ValueError as error:
        raise EdgekitError(
            f"{path}: {name}: {error}: no target holds them; schemes are {FORMS}"
        ) from error
    return Resolved(name, scheme, None, shape, scheme.nbytes(shape))


def _scheme(place: str, entry: Mapping[str, Any], arrays: Mapping[str, TensorEntry]) -> Scheme:
    key = f"{place}.codebook"
    return scheme_of(
        entry["bits"],
        entry["axis"],
        entry["group_size"],
        zero_points=f"{place}.zero_points" in arrays,
        signed=entry["signed"],
        codebook=_codebook(key, arrays[key]) if key in arrays else None,
    )


def _codebook(key: str, entry: TensorEntry) -> Tensor:
    """Read a codebook, which the scheme hangs on, once it is known to be small."""
    if entry.dtype != torch.int8 or len(entry.shape) not in (1, 2) or entry.nbytes > _MAX_CODEBOOK:
        raise ValueError("a codebook that is not [levels] or [books, levels] of int8")
    return read_tensor(key, entry)


def _check_storable(tensor: QuantizedTensor, scheme: Scheme) -> None:
    """Raise ValueError for codes and scales that some target would have to change."""
    if isinstance(scheme, Codebook):
        _check_scales(tensor.scales, SCALES)
        return
    if scheme.two_levels:
        return  # what QuantizedTensor holds is what the one target does
    grid = grid_of(scheme)
    least, most = (int(end) for end in tensor.codes.aminmax())
    if least < grid.low or most > grid.high:
        raise ValueError(
            f"{scheme.name} has codes from {grid.low} to {grid.high}, got {least} to {most}"
        )
    _check_scales(tensor.scales, grid.scales)


def _check_scales(scales: Tensor, storable: ScaleGrid) -> None:
    if not torch.equal(storable.round(scales), scales):
        raise ValueError(
            "a scale is none that every target holds: "
            f"{storable.significant_bits} significant bits, at least 2**-14"
        )
