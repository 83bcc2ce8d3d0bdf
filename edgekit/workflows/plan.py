"""What an export will write, planned before any weight is read, and without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Layout, Options, check_model, find_layout
from edgekit.exporters.contract.own_formats import own_formats
from edgekit.exporters.contract.stored import refusal, stored_rows, stored_table
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource, resolve_model
from edgekit.quantize.recipe import Recipe, Resolved, resolve
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

    `rows` say what edgekit quantizes, `table` what the file will hold (`table_json`): one of
    llama.cpp's formats is made of float rows. With `codes` nothing is quantized. `mixed` is what
    the budget of `quality` chose.
    """

    source: ModelSource
    recipe: Recipe
    rows: Sequence[Resolved]
    tied: Mapping[str, str]
    table: list[dict[str, Any]]
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
    def native(self) -> frozenset[str]:
        """The schemes that the file holds natively."""
        return self.layout.NATIVE_SCHEMES

    @property
    def model_file(self) -> str:
        """The engine's file in the artifact."""
        return self.layout.model_file(stored_rows(self.rows, self.native), self.options)


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
    stored = None if codes is None else _open_codes(codes, source.config)
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
    rows: Sequence[Resolved] = resolve(recipe, shapes) if stored is None else stored.rows
    if stored is not None:
        recipe, tied = Recipe((), stored.about.recipe), dict(stored.tied)
    try:
        layout.check_rows(stored_rows(rows, layout.NATIVE_SCHEMES))
    except EdgekitError as error:
        raise refusal(error, rows, layout.NATIVE_SCHEMES) from error
    table = _table(source, rows, tied, options, layout)
    return Plan(source, recipe, rows, tied, table, context, target, options, stored, quality, mixed)


def _table(
    source: ModelSource,
    rows: Sequence[Resolved],
    tied: Mapping[str, str],
    options: Options,
    layout: Layout,
) -> list[dict[str, Any]]:
    if options.llama_format is None:
        return stored_table(rows, tied, layout.NATIVE_SCHEMES)
    formats = own_formats(layout.NAME)
    return formats.planned_table(source.config, rows, tied, options.llama_format, options.imatrix)


def _open_codes(path: Path, config: ModelConfig) -> "CodesFile":
    from edgekit.models.codes import CodesFile  # needs torch

    return CodesFile.open(path, config)
