"""Opening what a user names where an artifact is wanted, which may be the name of a model."""

from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import Artifact, export_first
from edgekit.models.catalogue import catalogue, find_model


def open_artifact(path: Path | str) -> Artifact:
    """Open an artifact; EdgekitError as of `Artifact.open`.

    A model's name, given where no such folder is, is answered with the command that exports it.
    """
    name = str(path)
    if not Path(path).exists() and _is_model(name):
        raise EdgekitError(f"{name}: {export_first(name)}")
    return Artifact.open(path)


def _is_model(name: str) -> bool:
    return find_model(name) is not None or any(
        model.hub_id == name for model in catalogue().values()
    )
