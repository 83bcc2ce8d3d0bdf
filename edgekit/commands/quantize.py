"""`edgekit quantize`: codes and scales of a model in one safetensors file."""

from pathlib import Path

import click

from edgekit.commands._completion import models
from edgekit.commands._json import print_json
from edgekit.commands._module_options import ModuleChoice, module_options, refuse_for_a_module
from edgekit.commands._modules import quantize_module_of
from edgekit.commands._progress import progress_line
from edgekit.commands._quality_options import QualityChoice, quality_options, resumable
from edgekit.commands._recipe_options import RecipeChoice, recipe_options_of_any


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
        from edgekit.workflows.codes_file import plan_codes, write_planned

    with resumable(quality):
        with progress_line() as show:
            codes = plan_codes(
                model,
                output,
                choice.recipe(),
                choice.label,
                quality,
                dry_run=dry_run,
                force=force,
                revision=revision,
                random_weights=random_weights,
                adapter=adapter,
                progress=show,
            )
        for warning in codes.warnings():
            click.echo(f"edgekit: warning: {warning}", err=True)
        with progress_line() as show:
            codes = write_planned(codes, show)
    if as_json:
        print_json(codes.to_dict())
    else:
        click.echo(codes.text())
