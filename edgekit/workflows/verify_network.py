"""`verify` of a module's artifact: its file run on the inputs that the artifact keeps."""

from dataclasses import replace

from edgekit.common.progress import Progress
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.network import Case, compare
from edgekit.formats.artifact.manifest import REFERENCE_FILE, Manifest
from edgekit.formats.artifact.read import Artifact
from edgekit.runtime.engines.network_engine import load_module


def verify_module_artifact(artifact: Artifact, progress: Progress) -> Manifest:
    """Verify an unchanged artifact anew; return its manifest with the figures.

    No weights are needed: the artifact keeps inputs with the outputs that were computed at its
    export. They are fewer than ran then, in one batch, so the file keeps that record. Raises as
    `verify_artifact`.
    """
    if REFERENCE_FILE not in artifact.manifest.files:
        raise EdgekitError(f"{artifact.folder}: has no {REFERENCE_FILE}: export it again")
    case = Case.load(artifact.folder / REFERENCE_FILE)
    progress(f"verifying in {artifact.target}")
    with load_module(artifact.target, artifact.model_path) as engine:
        figures = compare(engine, [case]).to_dict()
    return replace(artifact.manifest, verification=figures)
