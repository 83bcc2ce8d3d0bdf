"""Reads the weights back out of an ONNX model that edgekit wrote, as the numbers they stand for."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from edgekit.errors import EdgekitError, one_line
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.exporters.onnx.names import SCALES, WEIGHT, ZERO_POINTS, parts
from edgekit.exporters.onnx.packing import Packed, unpack_matrix
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.model import Tensor as Constant
from edgekit.models.config import ModelConfig
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.packing import unpack
from edgekit.quantize.tensor import QuantizedTensor

_CODES = {"int8": (8, True), "uint8": (8, False), "int4": (4, True), "uint4": (4, False)}


def weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the checkpoint, by its name there, as float32, one after the other.

    A tied head comes last, and only where the file holds another one than the embedding.
    EdgekitError where the file holds other tensors than the model has.
    """
    shapes, tied = config.tied_shapes()
    reader = _Reader(OnnxFile.open(path), shapes)
    for name in shapes:
        if name not in tied or not reader.equal(name, tied[name]):
            yield name, reader.read(name)


def stored_size(path: Path, config: ModelConfig | None) -> StoredSize:
    """Return the bytes of the model's constants; EdgekitError as `weights`."""
    if config is None:
        raise EdgekitError(f"{path}: nothing says which model's tensors it holds")
    shapes, _ = config.tied_shapes()
    return StoredSize(_Reader(OnnxFile.open(path), shapes).nbytes(), config.parameter_count)


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: rows of a constant that others may share."""

    constant: str
    first_row: int


class _Reader:
    def __init__(self, model: OnnxFile, shapes: dict[str, tuple[int, ...]]) -> None:
        self._model, self._shapes = model, shapes
        self._constants = {tensor.name: tensor for tensor in model.graph.initializers}
        # `[columns, rows]`: the second factor of MatMul, if need be by way of DequantizeLinear.
        self._turned = {
            node.inputs[0 if node.operator == "DequantizeLinear" else 1]
            for node in model.graph.nodes
            if node.operator in ("DequantizeLinear", "MatMul") and len(node.inputs) > 1
        }
        self._places = dict(self._found())
        if HEAD not in self._places and EMBEDDING in self._places:
            self._places[HEAD] = self._places[EMBEDDING]

    def _found(self) -> Iterator[tuple[str, _Place]]:
        for constant in self._constants:
            if constant.endswith(WEIGHT):
                row = 0
                for name in parts(constant.removesuffix(WEIGHT)):
                    yield name + WEIGHT, _Place(constant, row)
                    row += self._shapes.get(name + WEIGHT, (0,))[0]
            elif constant in self._shapes:  # a bias
                yield constant, _Place(constant, 0)

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; read only where bytes are not shared."""
        first, second = self._spot(name), self._spot(other)
        return (first is not None and first == second) or torch.equal(
            self.read(name), self.read(other)
        )

    def _spot(self, name: str) -> tuple[str | None, int, str] | None:
        """Return where a tensor's bytes begin and their type; None where that is not known."""
        place = self._places.get(name)
        constant = None if place is None else self._constants.get(place.constant)
        if place is None or constant is None or constant.offset is None or place.first_row:
            return None
        return constant.location, constant.offset, constant.dtype

    def read(self, name: str) -> Tensor:
        place, shape = self._places.get(name), self._shapes[name]
        if place is None:
            raise self._error(f"holds no {name}")
        try:
            values = self._dequantized(self._constants[place.constant], shape[-1])
            rows = values[place.first_row : place.first_row + shape[0]]
        except (KeyError, ValueError, RuntimeError) as error:  # whatever its shapes contradict
            raise self._error(f"{name} cannot be read: {one_line(error)}") from error
        if rows.shape != shape:
            raise self._error(f"{name} must have the shape {shape}, not {tuple(rows.shape)}")
        return rows

    def _dequantized(self, constant: Constant, columns: int) -> Tensor:
        """Return a constant's numbers as `[rows, columns]`, a float's in its own shape."""
        values, turned = self._read(constant), constant.name in self._turned
        if constant.dtype == "float32":
            return values.t() if turned else values
        scales = self._read(self._constants[constant.name + SCALES])
        points = self._constants.get(constant.name + ZERO_POINTS)
        zeros = None if points is None else self._read(points)
        if turned:
            return _turned(*_CODES[constant.dtype], values, scales, zeros)
        numbers = values.reshape(len(values), -1)
        bits, block = numbers.shape[1] * 8 // columns, columns // scales.shape[1]
        return unpack_matrix(Packed(bits, block, numbers, scales, zeros)).dequantize()

    def _read(self, constant: Constant) -> Tensor:
        """Return a constant as it is stored, codes of 4 bits one by one."""
        data = bytearray(self._model.read(constant))
        if constant.dtype == "float32":
            return torch.frombuffer(data, dtype=torch.float32).reshape(constant.shape)
        bits, signed = _CODES[constant.dtype]
        stored = torch.frombuffer(data, dtype=torch.uint8)
        return unpack(stored, bits, prod(constant.shape), signed).reshape(constant.shape)

    def nbytes(self) -> int:
        """Return the bytes of all tensors; those that lie in one place once."""
        spots = dict[tuple[str | None, int], int]()
        for name in self._shapes:
            if name not in self._places:
                raise self._error(f"holds no {name}")
            constant = self._places[name].constant
            for part in (constant, constant + SCALES, constant + ZERO_POINTS):
                found = self._constants.get(part)
                if found is not None and found.offset is not None:
                    spots[found.location, found.offset] = found.stored_bytes
        return sum(spots.values())

    def _error(self, what: str) -> EdgekitError:
        return EdgekitError(f"{self._model.path}: {what}")


def _turned(bits: int, signed: bool, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Dequantize codes `[columns, rows]` with scales `[rows]` or `[blocks, rows]`."""
    weight = QuantizedTensor(
        codes.t().contiguous(),
        scales.t().contiguous(),
        None if zeros is None else zeros.t().contiguous().to(torch.int32),
        bits=bits,
        group_size=len(codes) // len(scales) if scales.ndim == 2 else None,
        axis=0 if scales.ndim == 1 else None,
    )
    return weight.dequantize()
