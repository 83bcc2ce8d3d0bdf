"""`edgekit quantize`: codes and scales of a model in one safetensors file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._json import print_json
from edgekit.commands._module_options import ModuleChoice, module_options
from edgekit.commands._modules import quantize_module_of
from edgekit.commands._recipe_options import RecipeChoice, recipe_options
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.models.source import ModelSource
    from edgekit.quantize.recipe import Resolved


@click.command("quantize", short_help="Write the quantized tensors as safetensors.")
@click.argument("model", metavar="MODEL|FILE.py:FUNCTION")
@recipe_options
@module_options
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
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def command(
    model: str,
    choice: RecipeChoice,
    module: ModuleChoice,
    output: Path | None,
    dry_run: bool,
    random_weights: bool,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL: a name of `edgekit models`, a hub id or a local folder.

    Prints what each tensor is stored as, its bytes, and the signal to quantization noise ratio.

    Of a module, FILE.py:FUNCTION as for `edgekit export`, it writes the codes and, beside them, the
    ranges of the activations: FILE.safetensors and FILE.calibration.json, which --calibrate takes.
    """
    from edgekit.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.user_code import Factory

    factory = Factory.parse(model)
    if factory is not None:
        if random_weights or revision is not None:
            raise EdgekitError("--random-weights and --revision are for language models")
        quantize_module_of(factory, choice, module, output, dry_run, force, as_json)
        return
    module.refuse_for_a_model()
    with interrupts_end_the_process():
        from edgekit.files import check_output_file
        from edgekit.models.source import resolve_model
        from edgekit.quantize.recipe import resolve, tied_shapes, warnings

    recipe = choice.recipe()
    # Shapes are all that a dry run needs: no weights are read or downloaded for it.
    source = resolve_model(model, revision=revision, random_weights=random_weights or dry_run)
    shapes, tied = tied_shapes(source.config.tensor_shapes())
    rows = resolve(recipe, shapes)
    path = None if dry_run else output or Path(f"{_last(source.id)}-{choice.label}.safetensors")
    if path is not None:
        check_output_file(path, force)
    for warning in warnings(rows):
        click.echo(f"edgekit: warning: {warning}", err=True)
    sqnr = None if path is None else _write(source, recipe.name, rows, tied, path)
    _show(source, rows, tied, sqnr, path, as_json)


def _write(
    source: "ModelSource",
    recipe: str,
    rows: "list[Resolved]",
    tied: dict[str, str],
    path: Path,
) -> dict[str, float]:
    """Quantize into `path`, with progress on a terminal; return each tensor's SQNR."""
    from edgekit.quantize.recipe import method_of
    from edgekit.quantize.storage import About, short_text
    from edgekit.quantize.write import quantize_to_file

    checkpoint = source.checkpoint
    about = About(short_text(source.id), checkpoint.sha256(), short_text(recipe), method_of(rows))
    get = checkpoint.tensor
    if not sys.stderr.isatty():
        return quantize_to_file(rows, get, path, tied, about=about)
    with click.progressbar(length=len(rows), label="quantizing", file=sys.stderr) as bar:
        return quantize_to_file(rows, get, path, tied, lambda _: bar.update(1), about)


def _show(
    source: "ModelSource",
    rows: "list[Resolved]",
    tied: dict[str, str],
    sqnr: dict[str, float] | None,
    path: Path | None,
    as_json: bool,
) -> None:
    from edgekit.quantize.table import format_table, table_json, total_bytes

    if not as_json:
        click.echo(format_table(rows, tied, sqnr))
        if path is not None:
            click.echo(f"wrote {path}")
        return
    record: dict[str, Any] = {
        "model": {"id": source.id, "revision": source.revision},
        "tensors": table_json(rows, tied, sqnr),
        "bytes": total_bytes(rows, tied),
        "file": None if path is None else str(path),
    }
    print_json(record)


def _last(model_id: str) -> str:
    """Return the part of a hub id that names the model."""
    return model_id.rsplit("/", 1)[-1]
