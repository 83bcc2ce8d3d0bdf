"""From an artifact back to the model that it was made of."""

from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import Artifact
from edgekit.models.source import ModelSource, resolve_model


def model_of(
    artifact: Artifact, model: str | None, instead: str, adapter: Path | None = None
) -> ModelSource:
    """Return the model of an artifact's weights, which are compared by their sha256.

    `model` is where the weights are, by default what the manifest names, and `adapter` the adapter
    that was merged into them; `instead` says what to do where that is not to be had. EdgekitError
    there, for other weights, and for a module.
    """
    if artifact.is_module:
        raise EdgekitError(
            f"{artifact.folder}: is a module, whose weights no checkpoint holds: export it again"
        )
    made_of = artifact.decoder.model
    if made_of.adapter is not None and adapter is None:
        raise EdgekitError(
            f"{artifact.folder}: the adapter {made_of.adapter.name!r:.80} is merged into it: "
            "`edgekit verify` takes its folder with `adapter`"
        )
    source = _resolve(artifact, model, instead, adapter)
    if source.checkpoint.sha256() != made_of.sha256:
        raise EdgekitError(
            f"{artifact.folder}: was made of other weights than those of {model or source.id}"
            + ("" if model else f"; {instead}")
        )
    return source


def _resolve(
    artifact: Artifact, model: str | None, instead: str, adapter: Path | None
) -> ModelSource:
    made_of = artifact.decoder.model
    revision = made_of.revision if model is None else None
    try:
        return resolve_model(
            model or made_of.id, revision, random_weights=made_of.random_weights, adapter=adapter
        )
    except EdgekitError as error:
        if model is not None:
            raise
        raise EdgekitError(
            f"{artifact.folder}: the model it was made of is not to be had: {error}; {instead}"
        ) from error
