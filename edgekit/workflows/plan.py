"""What an export will write, planned before any weight is read, and without torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Layout, Options, check_model, find_layout
from edgekit.exporters.contract.own_formats import own_formats
from edgekit.exporters.contract.stored import refusal, stored, stored_json
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource, resolve_model
from edgekit.quantize.recipe import Recipe, Table, resolve
from edgekit.workflows.quality import Quality

if TYPE_CHECKING:
    from edgekit.models.codes import CodesFile
    from edgekit.workflows.mixed_precision import Mixed

MIN_CONTEXT = 16
"""Fewest tokens that are worth a file.

One has no length to trace, and at two ExecuTorch decodes the second wrong (cause not found).
"""


@dataclass(frozen=True)
class Plan:
    """What an export will write, known before any weight is read.

    `table` says what edgekit quantizes, `listing` what the file will hold (`table_json`): one of
    llama.cpp's formats is made of floats. With `codes` nothing is quantized. `mixed` is what
    the budget of `quality` chose.
    """

    source: ModelSource
    recipe: Recipe
    table: Table
    listing: list[dict[str, Any]]
    context: int
    target: str
    options: Options
    codes: "CodesFile | None" = None
    quality: Quality = field(default_factory=Quality)
    mixed: "Mixed | None" = None

    @property
    def layout(self) -> Layout:
        """What the target's file can hold."""
        return find_layout(self.target, self.options)

    @property
    def model_file(self) -> str:
        """The engine's file in the artifact."""
        return self.layout.model_file(stored(self.table), self.options)


def plan_export(
    model: str,
    target: str,
    recipe: Recipe,
    context: int | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    options: Options | None = None,
    codes: Path | None = None,
    quality: Quality | None = None,
    steps: Steps | None = None,
    adapter: Path | None = None,
) -> Plan:
    """Resolve names, schemes and limits; every refusal that needs no weights happens here.

    `recipe` is `format_recipe`'s where the options name one of llama.cpp's formats, and has no
    meaning for `codes`, a file whose codes are packed as they are. `adapter` is merged into the
    weights. For a budget the cost of each tensor is measured here, and `steps` is told.
    """
    quality = quality or Quality()
    options = options or Options()
    layout = find_layout(target, options)
    source = resolve_model(model, revision=revision, random_weights=random_weights, adapter=adapter)
    try:
        check_model(layout, source.config, options)
    except EdgekitError as error:
        raise EdgekitError(f"{source.id}: {str(error).removeprefix('config: ')}") from error
    given = None if codes is None else _open_codes(codes, source.config)
    shapes, tied = source.config.tied_shapes()
    limit = source.config.max_context
    context = source.config.default_context if context is None else context
    least = min(MIN_CONTEXT, limit)
    if not least <= context <= limit:
        raise EdgekitError(f"`context` {context}: {source.id} takes {least} to {limit} tokens")
    mixed = None
    if codes is None and quality != Quality():
        from edgekit.workflows.target_schemes import choose_for_target  # measures with torch

        recipe, mixed = choose_for_target(source, target, layout, recipe, quality, steps)
    table = resolve(recipe, shapes, tied) if given is None else given.table
    if given is not None:
        recipe = Recipe((), given.about.recipe)
    table = replace(table, native=layout.NATIVE_SCHEMES)
    try:
        layout.check_rows(stored(table))
    except EdgekitError as error:
        raise refusal(error, table) from error
    listing = _listing(source, table, options, layout)
    return Plan(source, recipe, table, listing, context, target, options, given, quality, mixed)


def _listing(
    source: ModelSource, table: Table, options: Options, layout: Layout
) -> list[dict[str, Any]]:
    if options.llama_format is None:
        return stored_json(table)
    formats = own_formats(layout.NAME)
    return formats.planned_table(source.config, table, options.llama_format, options.imatrix)


def _open_codes(path: Path, config: ModelConfig) -> "CodesFile":
    from edgekit.models.codes import CodesFile  # needs torch

    return CodesFile.open(path, config)
