"""Weights read back from artifacts of any target, and compared tensor by tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.quantize.apply import ratio_db
from edgekit.quantize.tensor import CHUNK_ELEMENTS, as_rows

NamedTensors = Iterator[tuple[str, Tensor]]


def read_weights(target: str, path: Path, config: ModelConfig) -> NamedTensors:
    """Yield each tensor of a model file by its checkpoint name, dequantized, one at a time.

    Raises `EdgekitError` for a target whose weights cannot be read back, for a damaged file, for
    one that does not hold the model of `config`, and for infinities and NaN.
    """
    return _finite(path, _reader(target, path).weights(path, config))


def _finite(path: Path, weights: NamedTensors) -> NamedTensors:
    for name, tensor in weights:
        if not bool(torch.isfinite(tensor).all()):
            raise EdgekitError(f"{path}: tensor {name!r} holds infinities or NaN")
        yield name, tensor


def stored_size(target: str, path: Path, config: ModelConfig | None) -> StoredSize:
    """Return in how many bytes a model file stores how many weights.

    `config` is the model's; a GGUF needs none. Raises `EdgekitError` as `read_weights` does.
    """
    found: StoredSize = _reader(target, path).stored_size(path, config)
    return found


def _reader(target: str, path: Path) -> ModuleType:
    """Return the target's module, whose `weights` and `stored_size` take a path and a config.

    `weights` yields pairs of a checkpoint name and a float32 tensor.
    """
    try:
        return TARGETS.load(target, "readback")
    except EdgekitError as error:
        raise EdgekitError(f"{path}: {error}") from error


@dataclass(frozen=True)
class TensorComparison:
    """One tensor in several files, each compared with the first.

    differences  per file the greatest absolute difference, 0 exactly where all values are equal,
                 None where the file has no such tensor or one of another shape
    same_as      per file the place of the first file with the same values, its own where none has;
                 None where the file has no such tensor
    signal       the sum of squares of the reference's values, None without a reference
    noise        per file the sum of squares of the distances from it
    """

    tensor: str
    shape: tuple[int, ...]
    differences: tuple[float | None, ...]
    same_as: tuple[int | None, ...]
    signal: float | None
    noise: tuple[float | None, ...]

    @property
    def sqnr(self) -> tuple[float | None, ...]:
        """Per file the signal to quantization noise ratio in dB; None where it has no noise."""
        return tuple(known_ratio_db(self.signal, noise) for noise in self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON data."""
        return {
            "tensor": self.tensor,
            "shape": list(self.shape),
            "max_abs_difference": list(self.differences),
            "same_as": list(self.same_as),
            "sqnr_db": list(self.sqnr),
        }


def known_ratio_db(signal: float | None, noise: float | None) -> float | None:
    """Return `ratio_db`; None where one of them is unknown or zero."""
    return ratio_db(signal, noise) if signal and noise else None


def compare_weights(
    files: Sequence[NamedTensors], reference: Callable[[str], Tensor | None] | None = None
) -> Iterator[TensorComparison]:
    """Compare several files' weights; `reference` gives the float tensor of a name, if any.

    Memory holds one tensor of each file where the files list them in the same order, more where
    one has to wait for another.
    """
    for name, tensors in _aligned(files):
        first = next(tensor for tensor in tensors if tensor is not None)
        exact = None if reference is None else reference(name)
        if exact is not None and exact.shape != first.shape:
            exact = None
        yield TensorComparison(
            name,
            tuple(first.shape),
            tuple(_greatest_difference(first, tensor) for tensor in tensors),
            _same_as(tensors),
            None if exact is None else _square_sum(exact, None),
            tuple(
                None
                if exact is None or tensor is None or tensor.shape != exact.shape
                else _square_sum(exact, tensor)
                for tensor in tensors
            ),
        )


def _aligned(files: Sequence[NamedTensors]) -> Iterator[tuple[str, list[Tensor | None]]]:
    """Yield each name once every file has given it or has ended."""
    waiting: dict[str, list[Tensor | None]] = {}
    given: dict[str, int] = {}
    open_files = set(range(len(files)))
    while open_files:
        for index in sorted(open_files):
            try:
                name, tensor = next(files[index])
            except StopIteration:
                open_files.discard(index)
                continue
            waiting.setdefault(name, [None] * len(files))[index] = tensor
            given[name] = given.get(name, 0) + 1
            del tensor
            if given[name] == len(files):
                yield name, waiting.pop(name)
    while waiting:
        name = next(iter(waiting))
        yield name, waiting.pop(name)


def _same_as(tensors: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    """Return per tensor the place of the first with its values."""
    distinct: dict[int, Tensor] = {}
    return tuple(
        None if tensor is None else _place(tensor, place, distinct)
        for place, tensor in enumerate(tensors)
    )


def _place(tensor: Tensor, place: int, distinct: dict[int, Tensor]) -> int:
    for earlier, known in distinct.items():
        if torch.equal(known, tensor):
            return earlier
    distinct[place] = tensor
    return place


def _greatest_difference(first: Tensor, other: Tensor | None) -> float | None:
    if other is None or other.shape != first.shape:
        return None
    return max((float((a - b).abs().max()) for a, b in _blocks(first, other)), default=0.0)


def _square_sum(exact: Tensor, other: Tensor | None) -> float:
    """Sum the squares of `exact`, or of its distance from `other`."""
    if other is None:
        return sum(float(a.float().square().sum()) for a, _ in _blocks(exact, exact))
    return sum(float((a.float() - b).square().sum()) for a, b in _blocks(exact, other))


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield runs of rows that fit the cache: whole temporaries would be the peak of memory."""
    a, b = as_rows(one), as_rows(other)
    step = max(1, CHUNK_ELEMENTS * len(a) // max(1, a.numel()))
    return zip(a.split(step), b.split(step), strict=True)
