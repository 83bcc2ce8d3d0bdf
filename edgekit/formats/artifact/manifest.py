"""What `edgekit.json` says, typed: read by `from_json`, written by `to_json`, nowhere else.

A decoder is a language model, a network a user's module. An error is one line that names the field;
whoever reads a file puts the file's name before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.fields import is_count, optional, take, texts, without_none
from edgekit.formats.artifact.parts import (
    Activation,
    FileFacts,
    ModelFacts,
    NetworkInput,
    NetworkOutput,
    TensorRow,
)
from edgekit.version import DISTRIBUTION, __version__

FORMAT_VERSION = 1
"""The newest that is read and the one that is written; a change that older readers would
misunderstand makes another."""

MODULE = "module"
"""The `kind` of a network's manifest; a decoder's states none."""
REFERENCE_FILE = "reference.safetensors"
"""In a network's artifact: inputs and what they must give, for `edgekit verify` anywhere."""

_MAX_CONTEXT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _OfAnyModel:
    """What is known of every artifact.

    `file` is what the engine of `target` opens; `tensors` the table of schemes; `versions` are of
    what decided the file's bytes. `verification` holds the figures, empty where nobody verified;
    `files` all other files of the folder.
    """

    target: str
    file: str
    recipe: str | None
    tensors: tuple[TensorRow, ...]
    versions: Mapping[str, str]
    verification: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileFacts] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecoderManifest(_OfAnyModel):
    """What is known of a language model's artifact.

    `requires` are versions of what runs the file; `context` is in positions, `bos_id` and `eos_ids`
    are token ids. `method` chose the codes; of a file of codes there are the sha256 and the
    `facts`.
    """

    model: ModelFacts
    context: int
    bos_id: int
    eos_ids: tuple[int, ...]
    method: str | None = None
    codes_sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    llama_format: str | None = None
    requires: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_id(self) -> str:
        """Name of the model."""
        return self.model.id

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "DecoderManifest":
        """Read a document of a known version."""
        shared = _shared(document)
        context = take(document, "context", int)
        if not 1 <= context <= _MAX_CONTEXT:
            raise EdgekitError(f"context {context} is out of range")
        ids = (take(document, "bos_id", int), *take(document, "eos_ids", list))
        for token in ids:
            if type(token) is not int or token < 0:
                raise EdgekitError(f"bos_id and eos_ids must be token ids, got {token!r:.60}")
        return cls(
            **shared,
            model=ModelFacts.from_json(document["model"]),
            context=context,
            bos_id=ids[0],
            eos_ids=tuple(ids[1:]),
            method=optional(document, "method", str),
            codes_sha256=optional(document, "codes_sha256", str),
            facts=optional(document, "facts", dict) or {},
            llama_format=optional(document, "llama_format", str),
            requires=texts(document, "requires") if "requires" in document else {},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `edgekit.json`."""
        codes = {} if self.codes_sha256 is None else {"facts": dict(self.facts)}
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_json(),
            "target": self.target,
            "file": self.file,
            "recipe": self.recipe,
            **without_none({"method": self.method, "codes_sha256": self.codes_sha256}),
            **codes,
            "llama_format": self.llama_format,
            "tensors": [row.to_json() for row in self.tensors],
            "versions": dict(self.versions),
            "requires": dict(self.requires),
            "context": self.context,
            "bos_id": self.bos_id,
            "eos_ids": list(self.eos_ids),
            "verification": dict(self.verification),
            "files": _files_json(self.files),
        }


@dataclass(frozen=True, kw_only=True)
class NetworkManifest(_OfAnyModel):
    """What is known of a module's artifact.

    `model_id` is what it is called; `inputs` and `outputs` are in the order of the file's;
    `constant_outputs` is what else the module returns, the same in every call; `max_batch` the
    largest batch, None where only that of the inputs runs; `activations` have the parameters of
    each quantized value.
    """

    model_id: str
    inputs: tuple[NetworkInput, ...]
    outputs: tuple[NetworkOutput, ...]
    constant_outputs: Mapping[str, Any]
    max_batch: int | None
    activations: tuple[Activation, ...]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "NetworkManifest":
        """Read a document of a known version."""
        shared = _shared(document)
        max_batch = document.get("max_batch")
        if max_batch is not None and not is_count(max_batch):
            raise EdgekitError(f"max_batch must be a size or null, got {max_batch!r:.60}")
        inputs = take(document, "inputs", list)
        if not inputs:
            raise EdgekitError("inputs must not be empty")
        return cls(
            **shared,
            model_id=_model_id(document["model"]),
            inputs=tuple(map(NetworkInput.from_json, inputs)),
            outputs=tuple(map(NetworkOutput.from_json, take(document, "outputs", list))),
            constant_outputs=take(document, "constant_outputs", dict),
            max_batch=max_batch,
            activations=tuple(map(Activation.from_json, take(document, "activations", list))),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content of `edgekit.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": MODULE,
            "model": {"id": self.model_id},
            "target": self.target,
            "file": self.file,
            "recipe": self.recipe,
            "versions": dict(self.versions),
            "verification": dict(self.verification),
            "tensors": [without_none(row.to_json()) for row in self.tensors],
            "inputs": [item.to_json() for item in self.inputs],
            "outputs": [item.to_json() for item in self.outputs],
            "constant_outputs": dict(self.constant_outputs),
            "max_batch": self.max_batch,
            "activations": [item.to_json() for item in self.activations],
            "files": _files_json(self.files),
        }


Manifest = DecoderManifest | NetworkManifest


def from_json(document: object) -> Manifest:
    """Read what `to_json` wrote; EdgekitError for damage and for a newer version."""
    if not isinstance(document, dict):
        raise EdgekitError(f"must be a JSON object, got {type(document).__name__}")
    _check_version(document)
    kind = document.get("kind")
    if kind == MODULE:
        return NetworkManifest.from_json(document)
    if kind is not None:
        raise EdgekitError(f"kind must be {MODULE!r} or absent, got {kind!r:.60}")
    return DecoderManifest.from_json(document)


def _check_version(document: Mapping[str, Any]) -> None:
    version = take(document, "format_version", int)
    if version < 1:
        raise EdgekitError(f"format_version must be at least 1, got {version!r:.60}")
    if version > FORMAT_VERSION:
        versions = document.get("versions")
        writer = versions.get("edgekit") if isinstance(versions, dict) else None
        wanted = f"edgekit {writer:.40}" if isinstance(writer, str) else "a newer edgekit"
        raise EdgekitError(
            f"format_version {version!r:.40} is newer than {FORMAT_VERSION}, the last that edgekit "
            f"{__version__} reads: get {wanted}, `pip install --upgrade {DISTRIBUTION}`"
        )


def _shared(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that both kinds have; `model` is an object."""
    take(document, "model", dict)
    return {
        "target": take(document, "target", str),
        "file": take(document, "file", str),
        "recipe": optional(document, "recipe", str),
        "tensors": tuple(map(TensorRow.from_json, take(document, "tensors", list))),
        "versions": texts(document, "versions"),
        "verification": optional(document, "verification", dict) or {},
        "files": {
            name: FileFacts.from_json(name, facts)
            for name, facts in take(document, "files", dict).items()
        },
    }


def _model_id(model: Mapping[str, Any]) -> str:
    return take(model, "id", str, "model.")


def _files_json(files: Mapping[str, FileFacts]) -> dict[str, Any]:
    return {name: facts.to_json() for name, facts in files.items()}
