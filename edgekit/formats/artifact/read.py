"""Reading an artifact folder: `edgekit.json` and the files it lists, checked before use."""

import json
import math
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.common.files import load_json_object, os_reason, refuse_irregular, sha256_of
from edgekit.errors import EdgekitError

MANIFEST = "edgekit.json"
_CONFIG = "config.json"
TARGET_OF = {".gguf": "gguf", ".onnx": "onnx", ".pte": "executorch"}
"""Whose a model file is that comes without a manifest, by the end of its name."""
FORMAT_VERSION = 1
_TRANSFORMERS_JS = "onnx"
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_DEPTH = 32
_MAX_DIMS = 8
_NAME = r"\w[\w.+-]{0,127}"
_FILE_NAME = re.compile(rf"(?:({_NAME})/)?{_NAME}", re.ASCII)
"""A file of the folder, or of a folder in it: Transformers.js wants its models in `onnx/`."""
_TYPES: dict[str, type] = {
    "format_version": int,
    "model": dict,
    "target": str,
    "file": str,
    "tensors": list,
    "versions": dict,
    "files": dict,
}
_MODULE_TYPES: dict[str, type] = {
    "inputs": list,
    "outputs": list,
    "constant_outputs": dict,
    "activations": list,
}
_LANGUAGE_MODEL_TYPES: dict[str, type] = {"context": int, "bos_id": int, "eos_ids": list}
MODULE = "module"
"""The `kind` of an artifact that takes tensors rather than tokens; others do not state one."""

MODULE_DTYPES = ("float32", "int64", "int32", "uint8", "bool")
"""What the inputs of a module may be."""
_MAX_ELEMENTS = 1 << 28
_LAST_CODE = 255
"""Activations are uint8 in a manifest, whatever an engine's kernels take."""


class DamagedArtifact(EdgekitError):
    """A file of an artifact is missing or has another length than its manifest says."""


@dataclass(frozen=True)
class Artifact:
    """An opened artifact folder: its manifest is well-formed and its files have their sizes."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Artifact":
        """Read and check the manifest; EdgekitError where the folder is no whole artifact."""
        folder = Path(path)
        if not folder.is_dir():
            raise EdgekitError(f"{folder}: {_no_folder(folder)}")
        if not os.path.lexists(folder / MANIFEST):
            raise EdgekitError(f"{folder}: {_no_artifact(folder)}")
        manifest = _read_manifest(folder / MANIFEST)
        for name, facts in manifest["files"].items():
            _check_file(folder, name, facts)
        if manifest["file"] not in manifest["files"]:
            raise EdgekitError(
                f"{folder / MANIFEST}: file {manifest['file']!r:.60} is not in files"
            )
        if manifest.get("kind") != MODULE:
            _check_ids(folder, manifest)
        return cls(folder, manifest)

    @property
    def target(self) -> str:
        """Name of the engine that runs the model file."""
        return str(self.manifest["target"])

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.folder / str(self.manifest["file"])

    @property
    def is_module(self) -> bool:
        """Whether the model is a module, which has no context and no tokens."""
        return self.manifest.get("kind") == MODULE

    @property
    def context(self) -> int:
        """Positions the model file has room for; EdgekitError for a module."""
        if self.is_module:
            raise EdgekitError(
                f"{self.folder}: is a module, not a language model: `edgekit bench` measures it, "
                "`edgekit inspect` and `verify` take it, and edgekit.load_module runs it from "
                "Python"
            )
        return int(self.manifest["context"])

    @property
    def bos_id(self) -> int:
        """Token id that begins a sequence."""
        return int(self.manifest["bos_id"])

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a sequence."""
        return tuple(self.manifest["eos_ids"])

    def damaged_files(self) -> list[str]:
        """Return the files whose content is not what was written: reads every byte."""
        return [
            name
            for name, facts in self.manifest["files"].items()
            if sha256_of(self.folder / name) != facts["sha256"]
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


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        refuse_irregular(path)
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise EdgekitError(f"{path}: is too large to be a manifest")
        manifest = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
        _check_depth(manifest, _MAX_DEPTH)
    except OSError as error:
        raise EdgekitError(
            f"{path}: cannot be read: {os_reason(error)}; not an artifact"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise EdgekitError(f"{path}: must be a JSON object, got {type(manifest).__name__}")
    _check_manifest(path, manifest)
    return manifest


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


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    is_module = manifest.get("kind") == MODULE
    for key, kind in (_TYPES | (_MODULE_TYPES if is_module else _LANGUAGE_MODEL_TYPES)).items():
        value = manifest.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise EdgekitError(f"{path}: {key} must be {_json_name(kind)}, got {value!r:.60}")
    if manifest["format_version"] != FORMAT_VERSION:
        raise EdgekitError(
            f"{path}: format_version {manifest['format_version']} is not {FORMAT_VERSION}; "
            "it was made by another version of edgekit"
        )
    if not isinstance(manifest["model"].get("id"), str):
        raise EdgekitError(f"{path}: model.id must be a string")
    if is_module:
        _check_module(path, manifest)
    else:
        _check_language_model(path, manifest)
    for row in manifest["tensors"]:
        _check_row(path, row)


def _check_language_model(path: Path, manifest: dict[str, Any]) -> None:
    if not 1 <= manifest["context"] <= 1 << 30:
        raise EdgekitError(f"{path}: context {manifest['context']} is out of range")
    for token in (manifest["bos_id"], *manifest["eos_ids"]):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise EdgekitError(f"{path}: bos_id and eos_ids must be token ids, got {token!r:.60}")


def _check_ids(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse ids that are no tokens of the model, as far as `config.json` tells their number."""
    if _CONFIG not in manifest["files"]:
        return
    size = load_json_object(folder / _CONFIG).get("vocab_size")
    for token in (manifest["bos_id"], *manifest["eos_ids"]):
        if type(size) is int and token >= size:
            raise EdgekitError(
                f"{folder / MANIFEST}: bos_id and eos_ids must be token ids below {size}, the "
                f"vocabulary of {_CONFIG}, got {token}"
            )


def _check_module(path: Path, manifest: dict[str, Any]) -> None:
    largest = manifest.get("max_batch")
    if largest is not None and not _is_count(largest):
        raise EdgekitError(f"{path}: max_batch must be a size or null, got {largest!r:.60}")
    inputs = manifest["inputs"]
    for item in inputs:
        shape = item.get("shape") if isinstance(item, dict) else None
        if (
            not isinstance(shape, list)
            or not 1 <= len(shape) <= _MAX_DIMS
            or not all(_is_count(size) for size in shape)
            or math.prod(shape) > _MAX_ELEMENTS
            or item.get("dtype") not in MODULE_DTYPES
            or not isinstance(item.get("name"), str)
        ):
            raise EdgekitError(f"{path}: inputs must hold name, dtype and shape: {item!r:.80}")
    if not inputs:
        raise EdgekitError(f"{path}: inputs must not be empty")
    for item in manifest["outputs"]:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("name"), str)
            or not isinstance(item.get("dtype"), str)
            or not isinstance(item.get("shape"), list)
            or not all(size is None or _is_size(size) for size in item["shape"])
        ):
            raise EdgekitError(f"{path}: outputs must hold name, dtype and shape: {item!r:.80}")
    for item in manifest["activations"]:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("tensor"), str)
            or type(item.get("scale")) is not float
            or not item["scale"] > 0
            or type(item.get("zero_point")) is not int
            or not 0 <= item["zero_point"] <= _LAST_CODE
        ):
            raise EdgekitError(
                f"{path}: activations must hold tensor, scale and zero_point: {item!r:.80}"
            )


def _check_row(path: Path, row: object) -> None:
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("tensor"), str)
        or not isinstance(row.get("scheme"), str)
        or not _is_count(row.get("bytes"))
        or not isinstance(row.get("shape"), list)
        or not 1 <= len(row["shape"]) <= _MAX_DIMS
        or not all(_is_count(size) for size in row["shape"])
    ):
        raise EdgekitError(f"{path}: tensors must hold tensor, scheme, shape, bytes: {row!r:.80}")


def _is_count(value: object) -> bool:
    return _is_size(value) and value != 0


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _check_file(folder: Path, name: str, facts: object) -> None:
    manifest = folder / MANIFEST
    place = _FILE_NAME.fullmatch(name)
    if place is None or (place[1] is not None and (folder / place[1]).is_symlink()):
        raise EdgekitError(
            f"{manifest}: file name {name!r:.60} could leave the folder: allowed are letters, "
            "digits and . _ + -, in the folder or in one below it"
        )
    if (
        not isinstance(facts, dict)
        or not isinstance(facts.get("bytes"), int)
        or not isinstance(facts.get("sha256"), str)
    ):
        raise EdgekitError(f"{manifest}: files[{name!r:.60}] must hold bytes and sha256")
    path = folder / name
    if not path.is_file():
        raise DamagedArtifact(f"{path}: is missing, though {MANIFEST} lists it")
    if path.stat().st_size != facts["bytes"]:
        raise DamagedArtifact(
            f"{path}: has {path.stat().st_size} bytes, {MANIFEST} says {facts['bytes']}: "
            "it is truncated or was replaced; export again"
        )


def _json_name(kind: type) -> str:
    return {int: "an integer", dict: "an object", list: "a list", str: "a string"}[kind]
