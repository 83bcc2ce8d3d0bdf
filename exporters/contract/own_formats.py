"""Formats that a target's own engine quantizes to.

They are no schemes: which tensor gets which type, and how, is the engine's, and only the target's
file holds them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgekit.errors import EdgekitError
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Recipe, Table, uniform
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import FORMS

if TYPE_CHECKING:
    from torch import Tensor


class OwnFormats(Protocol):
    """A target's `own_formats.py`.

    `FORMATS` are the names, `ALIASES` others for some of them, and `LIKE_ONE` matches what looks
    like a name of this kind; `ENGINE` is whose they are.
    """

    ENGINE: str
    FORMATS: Sequence[str]
    ALIASES: Mapping[str, str]
    LIKE_ONE: re.Pattern[str]

    def planned_table(
        self,
        config: ModelConfig,
        table: Table,
        name: str,
        imatrix: Path | None,
    ) -> list[dict[str, Any]]:
        """Return what a format will store of a table of floats, as `table_json` does.

        `instead_of` is in a row whose length does not fit the type that the format wants. Needs no
        weights; EdgekitError where the imatrix is not of this model.
        """
        ...

    def check_table(
        self, path: Path, config: ModelConfig, table: Sequence[Mapping[str, Any]]
    ) -> None:
        """VerificationError where a written file does not store what `planned_table` said."""
        ...

    def stored_weights(self, path: Path, config: ModelConfig) -> Mapping[str, "Tensor"]:
        """Return the weights of a written file, float32, each read when it is asked for."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the version of what quantizes."""
        ...


def own_formats(target: str) -> OwnFormats:
    """Return a target's formats; EdgekitError where it has none."""
    return cast(OwnFormats, TARGETS.load(target, "own_formats"))


def find_format(name: str) -> str | None:
    """Return the name of a format in any case, by an alias too; None where it is none."""
    upper = name.upper()
    for formats in map(own_formats, TARGETS.names("own_formats")):
        found = formats.ALIASES.get(upper, upper)
        if found in formats.FORMATS:
            return found
    return None


def check_format(name: str) -> None:
    """Refuse a name that looks like a format and is none, naming the formats."""
    for formats in map(own_formats, TARGETS.names("own_formats")):
        if formats.LIKE_ONE.fullmatch(name) and find_format(name) is None:
            raise EdgekitError(
                f"unknown format {name!r:.40}: of {formats.ENGINE}'s own there are "
                f"{', '.join(formats.FORMATS)}; schemes are {FORMS}"
            )


def format_recipe(name: str) -> Recipe:
    """Return what a format asks of edgekit's own quantizers: nothing."""
    return Recipe(uniform(FLOAT).rules, name=name)
