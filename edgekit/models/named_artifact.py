"""Opening what a user names where an artifact is wanted, which may be the name of a model."""

from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import Artifact, export_first
from edgekit.models.catalogue import find_by_hub_id, find_model


def open_artifact(path: Path | str) -> Artifact:
    """Open an artifact; EdgekitError as of `Artifact.open`.

    A model's name, given where no such folder is, is answered with the command that exports it.
    """
    name = str(path)
    if not Path(path).exists() and (find_model(name) or find_by_hub_id(name)):
        raise EdgekitError(f"{name}: {export_first(name)}")
    return Artifact.open(path)
