"""Files of ONNX models: weights that lie beside them, and the folders of onnxruntime-genai."""

from pathlib import Path

from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import CONFIG, GenaiConfig
from edgekit.runtime.engines.files import ModelFolder

DESCRIPTION = CONFIG
BELOW = "onnx"
"""Transformers.js's repositories are so."""


def weight_files(path: Path) -> list[Path]:
    """Return the files of a model's external data."""
    return OnnxFile.open(path).external_files()


def open_folder(folder: Path) -> ModelFolder:
    """Read genai_config.json; EdgekitError where it is damaged."""
    config = GenaiConfig.open(folder)
    return ModelFolder(config.model_path, config.context, config.eos_ids)
