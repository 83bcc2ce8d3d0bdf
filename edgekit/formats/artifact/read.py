"""Reading an artifact folder: `edgekit.json` and the files it lists, checked before use."""

import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from edgekit.common.files import load_json_object, os_reason, refuse_irregular, sha256_of
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import (
    DecoderManifest,
    Manifest,
    NetworkManifest,
    from_json,
)
from edgekit.formats.artifact.older import with_outputs
from edgekit.formats.artifact.parts import FileFacts

MANIFEST = "edgekit.json"
_CONFIG = "config.json"
TARGET_OF = {".gguf": "gguf", ".onnx": "onnx", ".pte": "executorch"}
"""Target of a bare model file, by suffix."""
_TRANSFORMERS_JS = "onnx"
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_DEPTH = 32
_NAME = r"\w[\w.+-]{0,127}"
_FILE_NAME = re.compile(rf"(?:({_NAME})/)?{_NAME}", re.ASCII)
"""A file of the folder, or of a folder in it: Transformers.js wants its models in `onnx/`."""


class DamagedArtifact(EdgekitError):
    """A file of an artifact is missing or has another length than its manifest says."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact folder: its manifest is well-formed and its files have their sizes."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> "Artifact":
        """Read and check the manifest; EdgekitError where the folder is no whole artifact."""
        folder = Path(path)
        if not folder.is_dir():
            raise EdgekitError(f"{folder}: {_no_folder(folder)}")
        if not os.path.lexists(folder / MANIFEST):
            raise EdgekitError(f"{folder}: {_no_artifact(folder)}")
        manifest = _read_manifest(folder / MANIFEST)
        for name, facts in manifest.files.items():
            _check_file(folder, name, facts)
        if manifest.file not in manifest.files:
            raise EdgekitError(f"{folder / MANIFEST}: file {manifest.file!r:.60} is not in files")
        if isinstance(manifest, DecoderManifest):
            _check_ids(folder, manifest)
        return cls(folder, manifest)

    @property
    def target(self) -> str:
        """Name of the engine that runs the model file."""
        return self.manifest.target

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.folder / self.manifest.file

    @property
    def is_module(self) -> bool:
        """Whether the model is a module, which has no context and no tokens."""
        return isinstance(self.manifest, NetworkManifest)

    @property
    def decoder(self) -> DecoderManifest:
        """The manifest of a language model; EdgekitError for a module."""
        if isinstance(self.manifest, NetworkManifest):
            raise EdgekitError(
                f"{self.folder}: is a module, not a language model: `edgekit bench` measures it, "
                "`edgekit inspect` and `verify` take it, and edgekit.load_module runs it from "
                "Python"
            )
        return self.manifest

    @property
    def network(self) -> NetworkManifest:
        """The manifest of a module; EdgekitError for a language model."""
        if isinstance(self.manifest, DecoderManifest):
            raise EdgekitError(f"{self.folder}: is a language model, not a module")
        return self.manifest

    @property
    def context(self) -> int:
        """Positions the model file has room for; EdgekitError for a module."""
        return self.decoder.context

    @property
    def bos_id(self) -> int:
        """Token id that begins a sequence; EdgekitError for a module."""
        return self.decoder.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence; EdgekitError for a module."""
        return self.decoder.eos_ids

    def damaged_files(self) -> list[str]:
        """Return the files whose content is not what was written: reads every byte."""
        return [
            name
            for name, facts in self.manifest.files.items()
            if sha256_of(self.folder / name) != facts.sha256
        ]


def _no_folder(path: Path) -> str:
    if not path.exists():
        return "does not exist; make one with `edgekit export`"
    if not path.is_file():
        return "is no regular file: neither an artifact folder nor a model file"
    return "is a file, not an artifact folder; make one with `edgekit export`"


def export_first(name: str) -> str:
    """Say how to make an artifact of a model that stands in an artifact's place."""
    return (
        f"is a model, not an artifact: make one first, `edgekit export {shlex.quote(name)} "
        f"--target executorch`, which is then {Path(name).resolve().name.lower()}-executorch-int8"
    )


def _no_artifact(folder: Path) -> str:
    """Say what a folder without a manifest is, and what to do with it."""
    if (folder / _CONFIG).is_file() and any(folder.glob("*.safetensors")):
        return export_first(str(folder))
    return f"holds no {MANIFEST}, so it is no artifact; {_hint(folder)}"


def _hint(folder: Path) -> str:
    """Return a model file in a folder, if there is one; Transformers.js keeps them in `onnx/`."""
    places = (folder, folder / _TRANSFORMERS_JS)
    files = [
        file for place in places for end in TARGET_OF for file in sorted(place.glob(f"*{end}"))
    ]
    if files:
        return f"name a model file in it, such as {files[0]}"
    return "make one with `edgekit export`"


def _read_manifest(path: Path) -> Manifest:
    try:
        refuse_irregular(path)
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise EdgekitError(f"{path}: is too large to be a manifest")
        document = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
        _check_depth(document, _MAX_DEPTH)
    except OSError as error:
        raise EdgekitError(
            f"{path}: cannot be read: {os_reason(error)}; not an artifact"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: is not valid JSON: {error}") from error
    document = with_outputs(path.parent, document)
    try:
        return from_json(document)
    except EdgekitError as error:
        raise EdgekitError(f"{path}: {error}") from error


def _check_depth(value: object, allowed: int) -> None:
    """Refuse nesting that could be read, but not be copied or written again."""
    if not allowed:
        raise ValueError("its lists and objects are nested too deeply")
    items = value if isinstance(value, list) else ()
    for item in value.values() if isinstance(value, dict) else items:
        _check_depth(item, allowed - 1)


def _finite(text: str) -> float:
    """Refuse NaN, Infinity and 1e999: JSON has none, so they could not be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value


def _check_ids(folder: Path, manifest: DecoderManifest) -> None:
    """Refuse ids that are no tokens of the model, as far as `config.json` tells their number."""
    if _CONFIG not in manifest.files:
        return
    size = load_json_object(folder / _CONFIG).get("vocab_size")
    for token in (manifest.bos_id, *manifest.eos_ids):
        if type(size) is int and token >= size:
            raise EdgekitError(
                f"{folder / MANIFEST}: bos_id and eos_ids must be token ids below {size}, the "
                f"vocabulary of {_CONFIG}, got {token}"
            )


def _check_file(folder: Path, name: str, facts: FileFacts) -> None:
    manifest = folder / MANIFEST
    place = _FILE_NAME.fullmatch(name)
    if place is None or (place[1] is not None and (folder / place[1]).is_symlink()):
        raise EdgekitError(
            f"{manifest}: file name {name!r:.60} could leave the folder: allowed are letters, "
            "digits and . _ + -, in the folder or in one below it"
        )
    path = folder / name
    if not path.is_file():
        raise DamagedArtifact(f"{path}: is missing, though {MANIFEST} lists it")
    if path.stat().st_size != facts.bytes:
        raise DamagedArtifact(
            f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {facts.bytes}: "
            "it is truncated or was replaced; export again"
        )
