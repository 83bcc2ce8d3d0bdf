"""`edgekit inspect`: what a file is made of, or which tensors of a model cost the most."""

from pathlib import Path

from edgekit.common.files import read_text
from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.inspect.report import Report, inspect
from edgekit.formats.artifact.read import MANIFEST
from edgekit.formats.onnx.genai_config import is_genai_folder
from edgekit.models.catalogue import find_model


def inspect_file(name: str, check: bool = False) -> Report:
    """Report on an artifact or a model file; EdgekitError says what else a model's name needs.

    `check` compares every file with the sha256 in the manifest: VerificationError where it differs.
    """
    path = Path(name)
    if _is_model(path):
        raise EdgekitError(
            f"{name}: is a model, not an artifact: give `sensitivity` to rank its tensors, or "
            "inspect the folder that `edgekit export` makes of it"
        )
    return inspect(path, check)


def rank_tensors(
    name: str, scheme: str | None, text_file: Path | None, progress: Steps | None = None
) -> Report:
    """Return how far a model strays when one tensor alone is quantized, by a scheme's name.

    `name` is a model or an artifact, `text_file` what is measured on, by default a built-in text.
    """
    from edgekit.exporters.verify.reference_text import TEXT
    from edgekit.quantize.schemes.names import parse_scheme
    from edgekit.workflows.sensitivity import sensitivity  # needs torch

    parsed = parse_scheme(scheme or "w4g32")
    text = TEXT if text_file is None else read_text(text_file)
    return sensitivity(name, parsed, text, progress)


def _is_model(path: Path) -> bool:
    """Whether a path is a name of the catalogue's, or a model's folder, and no artifact."""
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors")) and (path / "config.json").is_file()
        return has_weights and not (path / MANIFEST).exists() and not is_genai_folder(path)
    return not path.exists() and find_model(str(path)) is not None
