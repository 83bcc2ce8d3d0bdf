"""`edgekit quantize`: codes and scales of a model in one safetensors file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._completion import models
from edgekit.commands._json import print_json
from edgekit.commands._module_options import ModuleChoice, module_options, refuse_for_a_module
from edgekit.commands._modules import quantize_module_of
from edgekit.commands._progress import progress_line
from edgekit.commands._quality_options import QualityChoice, quality_options, resumable
from edgekit.commands._recipe_options import RecipeChoice, recipe_options_of_any

if TYPE_CHECKING:
    from edgekit.models.source import ModelSource
    from edgekit.quantize.recipe import Recipe
    from edgekit.workflows.mixed_precision import Mixed
    from edgekit.workflows.quality import Quality
    from edgekit.workflows.quantize import Quantized


@click.command("quantize", short_help="Write the quantized tensors as safetensors.")
@click.argument("model", metavar="MODEL|FILE.py:FUNCTION", shell_complete=models)
@recipe_options_of_any
@module_options
@quality_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write  [default: MODEL-RECIPE.safetensors]",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the table of schemes and bytes, write nothing."
)
@click.option("--random-weights", is_flag=True, help="The model's shapes with random weights.")
@click.option(
    "--adapter",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A LoRA adapter (PEFT) to merge into the weights first.",
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def command(
    model: str,
    choice: RecipeChoice,
    module: ModuleChoice,
    chosen: QualityChoice,
    output: Path | None,
    dry_run: bool,
    random_weights: bool,
    adapter: Path | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL: a name of `edgekit models`, a hub id or a local folder.

    Prints what each tensor is stored as, its bytes, and the signal to quantization noise ratio.

    Of a module, FILE.py:FUNCTION as for `edgekit export`, it writes the codes and, beside them, the
    ranges of the activations: FILE.safetensors and FILE.calibration.json, which --codes and
    --calibrate of `edgekit export` take.

    With --calibrate, GPTQ chooses the codes on a part of a text; what each step gained is measured
    on the rest. The layers that are done are kept beside the output until the end: the same
    command goes on after a kill. --bits or --target-size choose a scheme for each matrix by what
    it costs (`edgekit inspect --sensitivity`), within a budget.
    """
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.networks.user_code import Factory

    factory = Factory.parse(model)
    if factory is not None:
        refuse_for_a_module(adapter=adapter, revision=revision, random_weights=random_weights)
        quantize_module_of(
            factory,
            choice,
            module,
            chosen,
            output=output,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
        return
    module.refuse_for_a_model()
    quality = chosen.of_a_model(choice)
    with interrupts_end_the_process():
        from edgekit.common.files import check_output_file
        from edgekit.models.source import resolve_model
        from edgekit.quantize.recipe import preset, warnings

    if output is not None and not dry_run:
        check_output_file(output, force)  # before anything is downloaded
    # Shapes are all that a dry run needs, but for a budget: no weights are read or downloaded.
    without_weights = dry_run and quality.budget is None
    source = resolve_model(
        model,
        revision=revision,
        random_weights=random_weights or without_weights,
        adapter=adapter,
    )
    label = choice.label if quality.budget is None else quality.budget.label
    path = None if dry_run else output or Path(f"{source.short_name}-{label}.safetensors")
    if path is not None:
        check_output_file(path, force)
    recipe = choice.recipe() if quality.budget is None else preset("int8")
    with resumable(quality):
        recipe, mixed = _choose(source, recipe, quality)
        report = _Report(source, recipe, mixed)
        for warning in [*source.notes(), *warnings(report.table)]:
            click.echo(f"edgekit: warning: {warning}", err=True)
        made = None if path is None else _write(source, recipe, quality, path)
    if as_json:
        print_json(report.to_dict(path, made))
    else:
        click.echo(report.text(path, made))


def _choose(
    source: "ModelSource", recipe: "Recipe", quality: "Quality"
) -> "tuple[Recipe, Mixed | None]":
    from edgekit.quantize.schemes.names import parse_scheme
    from edgekit.workflows.mixed_precision import EVERYWHERE
    from edgekit.workflows.quantize import choose_recipe, smaller_schemes

    with progress_line() as show:
        schemes = [parse_scheme(name) for name in EVERYWHERE]
        return choose_recipe(
            source,
            recipe,
            quality,
            schemes,
            progress=show,
            others=lambda: smaller_schemes(source.config),
        )


def _write(source: "ModelSource", recipe: "Recipe", quality: "Quality", path: Path) -> "Quantized":
    from edgekit.workflows.quantize import quantize_model

    with progress_line() as show:
        return quantize_model(source, recipe, quality, path, show)


class _Report:
    """What is printed: the table, the choices of a budget, what calibration gained."""

    def __init__(self, source: "ModelSource", recipe: "Recipe", mixed: "Mixed | None") -> None:
        from edgekit.quantize.recipe import resolve

        shapes, tied = source.config.tied_shapes()
        self.source, self.mixed = source, mixed
        self.table = resolve(recipe, shapes, tied)

    def text(self, path: Path | None, made: "Quantized | None") -> str:
        from edgekit.commands._quality_options import quality_text
        from edgekit.quantize.table import format_table

        sqnr = None if made is None else made.sqnr
        table = format_table(self.table, sqnr)
        last = [] if path is None else [f"wrote {path}"]
        return "\n".join([table, *quality_text(self.mixed, made), *last])

    def to_dict(self, path: Path | None, made: "Quantized | None") -> dict[str, Any]:
        from edgekit.commands._quality_options import quality_dict
        from edgekit.quantize.table import table_json

        sqnr = None if made is None else made.sqnr
        return {
            "model": {"id": self.source.id, "revision": self.source.revision, **self._adapter()},
            "tensors": table_json(self.table, sqnr),
            "bytes": self.table.nbytes,
            "file": None if path is None else str(path),
            **quality_dict(self.mixed, made),
        }

    def _adapter(self) -> dict[str, Any]:
        adapter = self.source.adapter
        return {} if adapter is None else {"adapter": adapter.to_dict()}
