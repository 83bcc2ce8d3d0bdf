"""The prediction of `fit` for an artifact: its own table, size and context instead of a plan's."""

from dataclasses import replace
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.runtime.engines.registry import ENGINES
from edgekit.runtime.engines.stated import stated_by
from edgekit.runtime.fit import Fit, Row, predict
from edgekit.runtime.model_files import find_model_file


def predict_artifact(path: Path, depth: int) -> tuple[Fit, str, str, str]:
    """Return the prediction, the model's id, the recipe's name and the target.

    EdgekitError as `predict`.
    """
    file = find_model_file(path)
    manifest = file.manifest
    if manifest is None:
        raise EdgekitError(f"{path}: is no artifact of edgekit's, so no table says what it holds")
    rows = [Row(row.tensor, row.shape, row.bytes) for row in manifest.tensors]
    if not {EMBEDDING, HEAD} <= {row.tensor for row in rows}:
        raise EdgekitError(f"{path}: its manifest has no {EMBEDDING} and {HEAD}")
    fit = predict(
        ModelConfig.load(path),
        rows,
        file.context or 0,
        depth,
        ENGINES.load(file.engine, "memory").MEMORY_MODEL,
        [row.tensor for row in manifest.tensors if row.same_as is not None],
        file.file_bytes,
    )
    # Blocks may be larger than what the scheme needs; a file's own table counts them.
    stated = stated_by(file.path, file.engine)
    if stated is not None and stated.traffic is not None:
        fit = replace(fit, weight_bytes=stated.traffic.weight_bytes)
    return fit, manifest.model.id, manifest.recipe or "", manifest.target
