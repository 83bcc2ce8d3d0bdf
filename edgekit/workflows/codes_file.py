"""`edgekit quantize` of a language model: planned, then written; what is printed of both."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.common.files import check_output_file
from edgekit.common.progress import Steps
from edgekit.models.source import ModelSource, resolve_model
from edgekit.quantize.recipe import Recipe, Table, preset, resolve, warnings
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.table import format_table, table_json
from edgekit.workflows.mixed_precision import EVERYWHERE, Mixed
from edgekit.workflows.quality import Quality
from edgekit.workflows.quantize import (
    Quantized,
    choose_recipe,
    quality_dict,
    quality_text,
    quantize_model,
    smaller_schemes,
)


@dataclass(frozen=True)
class PlannedCodes:
    """The tensors of a model as they are to be stored in `path`, or are stored there.

    `path` is None for a dry run, `made` before the file is written; `mixed` is what a budget chose.
    """

    source: ModelSource
    recipe: Recipe
    quality: Quality
    table: Table
    path: Path | None
    mixed: Mixed | None
    made: Quantized | None = None

    def warnings(self) -> list[str]:
        """Return what a user should know before it is written."""
        return [*self.source.notes(), *warnings(self.table)]

    def text(self) -> str:
        """Return the table, the choices of a budget and what calibration gained."""
        last = [] if self.path is None else [f"wrote {self.path}"]
        table = format_table(self.table, None if self.made is None else self.made.sqnr)
        return "\n".join([table, *quality_text(self.mixed, self.made), *last])

    def to_dict(self) -> dict[str, Any]:
        """Return the same for JSON."""
        model: dict[str, Any] = {"id": self.source.id, "revision": self.source.revision}
        if self.source.adapter is not None:
            model["adapter"] = self.source.adapter.to_dict()
        sqnr = None if self.made is None else self.made.sqnr
        return {
            "model": model,
            "tensors": table_json(self.table, sqnr),
            "bytes": self.table.nbytes,
            "file": None if self.path is None else str(self.path),
            **quality_dict(self.mixed, self.made),
        }


def plan_codes(
    model: str,
    output: Path | None,
    recipe: Recipe,
    label: str,
    quality: Quality,
    *,
    dry_run: bool = False,
    force: bool = False,
    revision: str | None = None,
    random_weights: bool = False,
    adapter: Path | None = None,
    progress: Steps | None = None,
) -> PlannedCodes:
    """Find the model and choose each tensor's scheme; nothing is written.

    `model` is a name of `edgekit models`, a hub id or a folder; `output` is MODEL-`label` by
    default, and only `force` replaces it. A budget of `quality` stands instead of the recipe and
    its label, and measures what each tensor costs; without one a `dry_run` reads no weights.

    Raises EdgekitError for what cannot be found, written or chosen.
    """
    if output is not None and not dry_run:
        check_output_file(output, force)  # before anything is downloaded
    # Shapes are all that a dry run needs, but for a budget: no weights are read or downloaded.
    without_weights = dry_run and quality.budget is None
    source = resolve_model(
        model, revision=revision, random_weights=random_weights or without_weights, adapter=adapter
    )
    if quality.budget is not None:
        recipe, label = preset("int8"), quality.budget.label
    path = None if dry_run else output or Path(f"{source.short_name}-{label}.safetensors")
    if path is not None:
        check_output_file(path, force)
    recipe, mixed = choose_recipe(
        source,
        recipe,
        quality,
        [parse_scheme(name) for name in EVERYWHERE],
        progress=progress,
        others=lambda: smaller_schemes(source.config),
    )
    shapes, tied = source.config.tied_shapes()
    return PlannedCodes(source, recipe, quality, resolve(recipe, shapes, tied), path, mixed)


def write_planned(plan: PlannedCodes, progress: Steps | None = None) -> PlannedCodes:
    """Write the codes and say what they were found to be; a dry run stays as it is.

    Raises EdgekitError as `write_codes` does.
    """
    if plan.path is None:
        return plan
    made = quantize_model(plan.source, plan.recipe, plan.quality, plan.path, progress)
    return replace(plan, made=made)
