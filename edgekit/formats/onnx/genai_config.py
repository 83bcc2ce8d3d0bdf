"""Reads `genai_config.json`, which names a model's file, its states and its limits.

onnxruntime-genai's own description of a folder (its `models/builder.py` writes it); edgekit's ONNX
artifacts hold one as well. Checked here, since such folders come from anywhere.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.common.files import os_reason
from edgekit.errors import EdgekitError

CONFIG = "genai_config.json"
_MAX_BYTES = 1 << 20
_MAX_COUNT = 1 << 30
_FILE_NAME = re.compile(r"\w[\w.+-]{0,127}", re.ASCII)


@dataclass(frozen=True)
class GenaiConfig:
    """What a folder says of its model; None or empty where it does not.

    `context` is the smaller of the model's and the search's bound on positions. `inputs` and
    `outputs` map genai's names (`past_key_names`, ...) to the graph's, `%d` for the layer.
    """

    folder: Path
    model_path: Path
    context: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    head_size: int | None
    vocab_size: int | None
    inputs: dict[str, str]
    outputs: dict[str, str]

    @classmethod
    def open(cls, folder: Path) -> "GenaiConfig":
        """Read and check a folder's file; EdgekitError where it is not sound."""
        path = folder / CONFIG
        try:
            return cls._read(folder, _Reader(path, _load(path)))
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error

    @classmethod
    def _read(cls, folder: Path, root: "_Reader") -> "GenaiConfig":
        model = root.group("model")
        decoder, search = model.group("decoder"), root.group("search")
        limits = (model.count("context_length"), search.count("max_length"))
        name = decoder.text("filename")
        if not _FILE_NAME.fullmatch(name):
            raise EdgekitError(f"{root.path}: filename {name!r:.60} is no plain name of a file")
        if not (folder / name).is_file():
            raise EdgekitError(f"{folder / name}: is missing, though {CONFIG} names it")
        bos_id, eos_ids = model.count("bos_token_id", least=0), model.counts("eos_token_id")
        size = model.count("vocab_size")
        for token in (bos_id, *eos_ids):
            if token is not None and size is not None and token >= size:
                raise EdgekitError(
                    f"{root.path}: bos_token_id and eos_token_id must be below its vocab_size "
                    f"{size}, got {token}"
                )
        return cls(
            folder=folder,
            model_path=folder / name,
            context=min((limit for limit in limits if limit is not None), default=None),
            bos_id=bos_id,
            eos_ids=eos_ids,
            head_size=decoder.count("head_size"),
            vocab_size=size,
            inputs=decoder.group("inputs").texts(),
            outputs=decoder.group("outputs").texts(),
        )


def is_genai_folder(folder: Path) -> bool:
    """Whether a folder is one of onnxruntime-genai's."""
    return (folder / CONFIG).is_file()


def _load(path: Path) -> object:
    if path.stat().st_size > _MAX_BYTES:
        raise EdgekitError(f"{path}: is too large to be a configuration")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: is not valid JSON: {error}") from error


@dataclass(frozen=True)
class _Reader:
    """One object of the file; what has another type than it should is refused by name."""

    path: Path
    value: object

    def group(self, key: str) -> "_Reader":
        return _Reader(self.path, self._object().get(key, {}))

    def text(self, key: str) -> str:
        value = self._object().get(key)
        if not isinstance(value, str):
            raise EdgekitError(f"{self.path}: {key} must be a string, got {value!r:.60}")
        return value

    def texts(self) -> dict[str, str]:
        return {key: self.text(key) for key in self._object()}

    def count(self, key: str, least: int = 1) -> int | None:
        value = self._object().get(key)
        return None if value is None else self._checked(key, value, least)

    def counts(self, key: str) -> tuple[int, ...]:
        """Return an integer, or a list of them, as a tuple."""
        value = self._object().get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._checked(key, one, least=0) for one in values)

    def _checked(self, key: str, value: object, least: int) -> int:
        if type(value) is not int or not least <= value <= _MAX_COUNT:
            raise EdgekitError(
                f"{self.path}: {key} must be an integer of {least} to {_MAX_COUNT}, "
                f"got {value!r:.60}"
            )
        return value

    def _object(self) -> Mapping[str, object]:
        if not isinstance(self.value, dict):
            raise EdgekitError(f"{self.path}: must hold objects, got {self.value!r:.60}")
        return self.value
