"""The models known by short name; the data lie in catalogue.toml."""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class CatalogueModel:
    """One known model: on the hub (`hub_id`) or bundled with the package (`folder`)."""

    name: str
    licence: str
    hub_id: str | None = None
    folder: Path | None = None
    aliases: tuple[str, ...] = ()
    architecture: Mapping[str, Any] | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's shapes, known without a download."""
        if self.folder is not None:
            return ModelConfig.load(self.folder)
        assert self.architecture is not None
        return ModelConfig.from_dict(self.architecture)


@functools.cache
def catalogue() -> dict[str, CatalogueModel]:
    """Return every known model by its short name, in the order of the list."""
    data = tomllib.loads((_HERE / "catalogue.toml").read_text(encoding="utf-8"))
    return {
        name: _model(name, data["defaults"] | entry, data["architectures"], data["common"])
        for name, entry in data["models"].items()
    }


def find_model(name: str) -> CatalogueModel | None:
    """Return the model of a short name or an alias (in any case); None if there is none."""
    wanted = name.lower()
    for model in catalogue().values():
        if wanted == model.name or wanted in model.aliases:
            return model
    return None


def find_by_hub_id(hub_id: str) -> CatalogueModel | None:
    """Return the model that the hub has under that id; None if the catalogue has none."""
    return next((model for model in catalogue().values() if model.hub_id == hub_id), None)


def unknown_model(name: str) -> EdgekitError:
    """Make the error for a name that is neither known, nor a folder, nor a hub id."""
    known = [alias for model in catalogue().values() for alias in (model.name, *model.aliases)]
    close = difflib.get_close_matches(name[:80].lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else "`edgekit models` lists the known ones"
    return EdgekitError(
        f"unknown model {name[:80]!r}: not a catalogue name, a model folder or a hub "
        f"id (ORG/NAME); {hint}"
    )


def _model(
    name: str,
    entry: Mapping[str, Any],
    architectures: Mapping[str, Any],
    common: Mapping[str, Any],
) -> CatalogueModel:
    own = architectures[entry["architecture"]] if "architecture" in entry else None
    return CatalogueModel(
        name=name,
        licence=entry["licence"],
        hub_id=entry.get("hub"),
        folder=_HERE / entry["folder"] if "folder" in entry else None,
        aliases=tuple(entry.get("aliases", ())),
        architecture=None if own is None else common[own["model_type"]] | own,
    )
