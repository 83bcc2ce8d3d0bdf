"""The parts of a manifest: files, the model, tensors, what a network takes and gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.fields import (
    is_count,
    is_shape,
    is_size,
    optional,
    take,
    without_none,
)

MODULE_DTYPES = ("float32", "int64", "int32", "uint8", "bool")
"""What the inputs of a network may be."""

_MAX_ELEMENTS = 1 << 28
_LAST_CODE = 255
"""Activations are uint8 in a manifest, whatever an engine's kernels take."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and sha256 of a file of the folder."""

    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, name: str, value: object) -> "FileFacts":
        """Read the facts of the file `name`."""
        if (
            not isinstance(value, dict)
            or type(value.get("bytes")) is not int
            or not isinstance(value.get("sha256"), str)
        ):
            raise EdgekitError(f"files[{name!r:.60}] must hold bytes and sha256")
        return cls(value["bytes"], value["sha256"])

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON's types."""
        return {"bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class AdapterFacts:
    """The LoRA adapter that was merged into the weights; `base` is the model it was trained on."""

    name: str
    sha256: str
    base: str | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AdapterFacts":
        """Read `model.adapter`."""
        return cls(
            take(value, "name", str, "model.adapter."),
            take(value, "sha256", str, "model.adapter."),
            optional(value, "base", str, "model.adapter."),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON's types."""
        return {"name": self.name, "sha256": self.sha256, "base": self.base}


@dataclass(frozen=True)
class ModelFacts:
    """The language model that a file was made of; `sha256` is that of its weights."""

    id: str
    revision: str | None = None
    random_weights: bool = False
    sha256: str | None = None
    parameters: int | None = None
    adapter: AdapterFacts | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelFacts":
        """Read a decoder's `model`."""
        random_weights = value.get("random_weights", False)
        if not isinstance(random_weights, bool):
            raise EdgekitError(
                f"model.random_weights must be true or false, got {random_weights!r:.60}"
            )
        adapter = optional(value, "adapter", dict, "model.")
        return cls(
            take(value, "id", str, "model."),
            optional(value, "revision", str, "model."),
            random_weights,
            optional(value, "sha256", str, "model."),
            optional(value, "parameters", int, "model."),
            None if adapter is None else AdapterFacts.from_json(adapter),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON's types, without those that nobody knows."""
        known = {
            "sha256": self.sha256,
            "parameters": self.parameters,
            "adapter": None if self.adapter is None else self.adapter.to_json(),
        }
        return {
            "id": self.id,
            "revision": self.revision,
            "random_weights": self.random_weights,
            **without_none(known),
        }


@dataclass(frozen=True)
class TensorRow:
    """One row of the table: what a tensor is stored as, in how many bytes of the file.

    `range` is how the range of its codes was found, None for floats and in networks; `same_as`
    names the tensor whose codes it shares; `stored_as` is the scheme that holds its codes where
    the file has no form of `scheme`, `instead_of` the one that its row's length does not fit.
    """

    tensor: str
    scheme: str
    shape: tuple[int, ...]
    bytes: int
    range: str | None = None
    instead_of: str | None = None
    same_as: str | None = None
    stored_as: str | None = None

    @classmethod
    def from_json(cls, value: object) -> "TensorRow":
        """Read a row of `tensors`."""
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("tensor"), str)
            or not isinstance(value.get("scheme"), str)
            or not is_count(value.get("bytes"))
            or not is_shape(value.get("shape"))
        ):
            raise EdgekitError(f"tensors must hold tensor, scheme, shape, bytes: {value!r:.80}")
        return cls(
            value["tensor"],
            value["scheme"],
            tuple(value["shape"]),
            value["bytes"],
            *(
                optional(value, key, str, "tensors: ")
                for key in ("range", "instead_of", "same_as", "stored_as")
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON's types."""
        return {
            "tensor": self.tensor,
            "scheme": self.scheme,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "range": self.range,
            **without_none(
                {
                    "instead_of": self.instead_of,
                    "same_as": self.same_as,
                    "stored_as": self.stored_as,
                }
            ),
        }


@dataclass(frozen=True)
class NetworkInput:
    """An input of a network; the first axis of `shape` is the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def from_json(cls, value: object) -> "NetworkInput":
        """Read an item of `inputs`."""
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("name"), str)
            or value.get("dtype") not in MODULE_DTYPES
            or not is_shape(value.get("shape"))
            or math.prod(value["shape"]) > _MAX_ELEMENTS
        ):
            raise EdgekitError(f"inputs must hold name, dtype and shape: {value!r:.80}")
        return cls(value["name"], value["dtype"], tuple(value["shape"]))

    def to_json(self) -> dict[str, Any]:
        """Return the input as JSON's types."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class NetworkOutput:
    """An output of a network; sizes that vary with the batch are None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def from_json(cls, value: object) -> "NetworkOutput":
        """Read an item of `outputs`."""
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("name"), str)
            or not isinstance(value.get("dtype"), str)
            or not isinstance(value.get("shape"), list)
            or not all(size is None or is_size(size) for size in value["shape"])
        ):
            raise EdgekitError(f"outputs must hold name, dtype and shape: {value!r:.80}")
        return cls(value["name"], value["dtype"], tuple(value["shape"]))

    def to_json(self) -> dict[str, Any]:
        """Return the output as JSON's types."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Activation:
    """Scale and zero point of a value's uint8 codes."""

    tensor: str
    scale: float
    zero_point: int

    @classmethod
    def from_json(cls, value: object) -> "Activation":
        """Read an item of `activations`."""
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("tensor"), str)
            or type(value.get("scale")) is not float
            or not value["scale"] > 0
            or type(value.get("zero_point")) is not int
            or not 0 <= value["zero_point"] <= _LAST_CODE
        ):
            raise EdgekitError(f"activations must hold tensor, scale and zero_point: {value!r:.80}")
        return cls(value["tensor"], value["scale"], value["zero_point"])

    def to_json(self) -> dict[str, Any]:
        """Return the activation as JSON's types."""
        return {"tensor": self.tensor, "scale": self.scale, "zero_point": self.zero_point}
