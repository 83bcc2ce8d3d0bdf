"""`inspect`: from an artifact or a bare model file to a report, by target."""

from pathlib import Path
from typing import Any, Protocol, cast

from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.registry import TARGETS
from edgekit.formats.artifact.manifest import Manifest
from edgekit.formats.artifact.read import MANIFEST, TARGET_OF, Artifact, DamagedArtifact
from edgekit.formats.onnx.genai_config import GenaiConfig, is_genai_folder
from edgekit.models.named_artifact import open_artifact


class Report(Protocol):
    """What `edgekit inspect` shows."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for `--json`."""
        ...

    def text(self) -> str:
        """Return Markdown tables; what a file calls itself cannot steer a terminal."""
        ...


class Inspector(Protocol):
    """A module that reports on one target's files."""

    def report(self, path: Path, manifest: Manifest | None, checked: int | None) -> Report:
        """Report on a model file; EdgekitError where it is foreign or corrupt.

        `manifest` is None for a bare file; `checked` counts the files whose content was compared
        with it, None where that was not asked for.
        """
        ...


def inspect(path: Path, check: bool = False) -> Report:
    """Report on an artifact folder, one of onnxruntime-genai's, a model file or a calibration.

    `check` compares every file's sha256 with the manifest: VerificationError names those that
    differ. EdgekitError where something is missing, foreign or corrupt.
    """
    if path.is_file():
        if check:
            raise EdgekitError(
                f"{path}: `check` needs the artifact folder, whose manifest holds the sha256"
            )
        return _bare_file(path)
    if is_genai_folder(path) and not (path / MANIFEST).exists() and not check:
        return _bare_file(GenaiConfig.open(path).model_path)
    artifact = open_unchanged(path) if check else open_artifact(path)
    checked = len(artifact.manifest.files) if check else None
    return _inspector(artifact.target, path).report(artifact.model_path, artifact.manifest, checked)


def _bare_file(path: Path) -> Report:
    if path.suffix == ".json":
        from edgekit.exporters.inspect import calibration as inspect_calibration

        return inspect_calibration.report(path)
    target = TARGET_OF.get(path.suffix.lower())
    if path.suffix == ".safetensors":
        raise EdgekitError(
            f"{path}: is no engine's file: of codes that `edgekit quantize` wrote, `edgekit export "
            f"MODEL --target TARGET --codes {path} --dry-run` shows the table"
        )
    if target is None:
        raise EdgekitError(f"{path}: is no file of those that end in {', '.join(TARGET_OF)}")
    return _inspector(target, path).report(path, None, None)


def _inspector(target: str, path: Path) -> Inspector:
    try:
        return cast(Inspector, TARGETS.load(target, "inspect"))
    except EdgekitError as error:
        raise EdgekitError(f"{path}: {error}") from error


def open_unchanged(path: Path) -> Artifact:
    """Open an artifact and compare every file with its length and sha256 in the manifest.

    VerificationError names those that differ or are missing.
    """
    try:
        artifact = open_artifact(path)
        damaged = artifact.damaged_files()
    except DamagedArtifact as error:
        raise VerificationError(str(error)) from error
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
    if damaged:
        raise VerificationError(
            f"{path}: damaged since it was exported: {', '.join(damaged)}; export again"
        )
    return artifact
