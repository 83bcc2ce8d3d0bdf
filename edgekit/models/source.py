"""From what a user names (a short name, a folder, a hub id) to a configuration and weights."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError
from edgekit.models.catalogue import (
    CatalogueModel,
    catalogue,
    find_by_hub_id,
    find_model,
    unknown_model,
)
from edgekit.models.config import ModelConfig
from edgekit.models.hub_name import one_revision, parse_hub_name
from edgekit.models.kinds import file_kind, folder_without_config

if TYPE_CHECKING:
    from edgekit.models.adapter import Adapter
    from edgekit.models.checkpoint import WeightSource

ARTIFACT_MANIFEST = "edgekit.json"


@dataclass(frozen=True)
class ModelSource:
    """A model whose configuration is known and whose weights can be had.

    `id` is the hub id, the catalogue name or the folder's name; `revision` the commit of a model
    from the hub, else None; `folder` holds the tokenizer's files, or is None for random weights
    without a folder; `offline` takes the weights from the hub's local cache alone; `adapter` is
    merged into them.
    """

    id: str
    revision: str | None
    config: ModelConfig
    folder: Path | None
    random_weights: bool = False
    offline: bool = False
    adapter: "Adapter | None" = None

    @property
    def short_name(self) -> str:
        """What default names of outputs begin with: the last part of the id, in lower case."""
        return Path(self.id).name.lower()

    def notes(self) -> list[str]:
        """Return what a user should know of it: an adapter of another model."""
        if self.adapter is None:
            return []
        found = self.adapter.of_another_model(self.id, *_names(self.id))
        return [] if found is None else [found]

    @cached_property
    def checkpoint(self) -> "WeightSource":
        """The weights, with the adapter if there is one.

        A model from the hub is downloaded when they are first asked for. Their names and shapes are
        checked against the configuration.
        """
        if self.adapter is None:
            return self._own_checkpoint()
        from edgekit.models.adapter import Adapted

        return Adapted(self._own_checkpoint(), self.adapter)

    def _own_checkpoint(self) -> "WeightSource":
        # Weights need torch, which takes a second to import; names and shapes do not.
        from edgekit.models.checkpoint import Checkpoint
        from edgekit.models.random_weights import RandomCheckpoint

        if self.random_weights:
            return RandomCheckpoint(self.config)
        assert self.folder is not None
        if self.revision is not None:
            from edgekit.models.hub import download  # see _from_hub

            download(self.id, self.revision, offline=self.offline)
        checkpoint = Checkpoint.open(self.folder)
        checkpoint.validate(self.config)
        return checkpoint


@dataclass(frozen=True)
class ModelRow:
    """One line of `edgekit models`; `local_bytes` is None for one that is not on this machine."""

    name: str
    aliases: tuple[str, ...]
    parameters: int
    licence: str
    hub_id: str | None
    local_bytes: int | None


def list_models() -> list[ModelRow]:
    """Return the catalogue with what of it is bundled or complete in the hub's local cache."""
    from edgekit.models.hub import cached_bytes  # see _from_hub

    rows = []
    for model in catalogue().values():
        if model.folder is not None:
            size: int | None = sum(file.stat().st_size for file in model.folder.iterdir())
        else:
            size = cached_bytes(model.hub_id or "")
        count = model.config.parameter_count
        rows.append(ModelRow(model.name, model.aliases, count, model.licence, model.hub_id, size))
    return rows


def resolve_model(
    name: str,
    revision: str | None = None,
    random_weights: bool = False,
    offline: bool = False,
    adapter: Path | None = None,
) -> ModelSource:
    """Find a model by catalogue name, local folder or hub id, and read its configuration.

    A catalogue name wins over a folder of the same name; `./NAME` means the folder. A revision may
    also stand behind either, `NAME@REVISION`, or in the address of the model's page on the hub
    (`parse_hub_name`). Of a model on the hub the small files are downloaded, the weights with
    `ModelSource.checkpoint`; random weights of a catalogue name need the hub only for a `revision`
    of its config.json. `adapter` is the folder of a LoRA adapter, which must fit the model.
    """
    source = _resolve(name.strip(), revision, random_weights, offline)
    if adapter is None:
        return source
    from edgekit.models.adapter import Adapter

    return replace(source, adapter=Adapter.open(adapter, source.config))


def _resolve(name: str, revision: str | None, random_weights: bool, offline: bool) -> ModelSource:
    known = find_model(name)
    if known is not None:
        return _from_catalogue(known, revision, random_weights, offline)
    folder = _local(name)
    if folder is not None:
        if (folder / ARTIFACT_MANIFEST).is_file():
            raise EdgekitError(
                f"{name}: is an exported artifact; give the model it was made of", field="model"
            )
        if folder.is_dir():
            return _from_folder(_refuse_revision(str(folder), revision), folder, random_weights)
        raise EdgekitError(f"{name}: {file_kind(folder)}", field="model")
    word, _, named = name.rstrip("/").partition("@")
    known = find_model(word)
    if known is not None:
        revision = one_revision(name, named or None, revision)
        return _from_catalogue(known, revision, random_weights, offline)
    found = parse_hub_name(name)
    if found is None:
        raise unknown_model(name)
    revision = one_revision(name, found.revision, revision)
    return _from_hub(found.id, revision, random_weights, offline)


def _names(hub_id: str) -> list[str]:
    """Return the catalogue's names of a model."""
    known = catalogue().get(hub_id) or find_by_hub_id(hub_id)
    return [] if known is None else [known.name, *known.aliases]


def _local(name: str) -> Path | None:
    """Return the path of that name, `~` resolved, where there is something."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, `~` of nobody, a zero byte
        return None


def _from_catalogue(
    model: CatalogueModel, revision: str | None, random_weights: bool, offline: bool
) -> ModelSource:
    if model.folder is not None:
        return _from_folder(_refuse_revision(model.name, revision), model.folder, random_weights)
    assert model.hub_id is not None
    if random_weights and revision is None:
        return ModelSource(model.hub_id, None, model.config, None, random_weights)
    return _from_hub(model.hub_id, revision, random_weights, offline)


def _from_folder(name: str, folder: Path, random_weights: bool) -> ModelSource:
    if not (folder / "config.json").is_file():
        raise EdgekitError(f"{folder}: {folder_without_config(folder)}")
    return ModelSource(name, None, ModelConfig.load(folder), folder, random_weights)


def _from_hub(
    hub_id: str, revision: str | None, random_weights: bool, offline: bool
) -> ModelSource:
    from edgekit.models.hub import download  # pulls in an HTTP client that folders do not need

    folder = download(hub_id, revision, offline=offline, weights=False)
    source = _from_folder(hub_id, folder, random_weights)
    return replace(source, revision=folder.name, offline=offline)


def _refuse_revision(name: str, revision: str | None) -> str:
    """Return the name that goes into manifests: no path of the user's machine."""
    if revision is not None:
        raise EdgekitError(f"{name}: is a local folder; `revision` is for models on the hub")
    return Path(name).resolve().name or name
