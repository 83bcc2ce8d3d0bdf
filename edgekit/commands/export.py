"""`edgekit export`: from a model's name to a verified artifact folder."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from edgekit.commands._completion import models, targets
from edgekit.commands._json import print_json
from edgekit.commands._module_options import ModuleChoice, module_options, refuse_for_a_module
from edgekit.commands._modules import export_module_of
from edgekit.commands._progress import progress_line
from edgekit.commands._quality_options import (
    QualityChoice,
    quality_options,
    resumable,
)
from edgekit.commands._recipe_options import RecipeChoice, recipe_options_of_any
from edgekit.commands._size import size_line

if TYPE_CHECKING:
    from edgekit.formats.artifact.manifest import Manifest
    from edgekit.workflows.plan import Plan
    from edgekit.workflows.quantize import Quantized


@click.command("export", short_help="Export a model for an engine and verify the file.")
@click.argument("model", metavar="MODEL|FILE.py:FUNCTION", shell_complete=models)
@click.option(
    "--target",
    required=True,
    metavar="TARGET",
    help="executorch, gguf or onnx",
    shell_complete=targets,
)
@recipe_options_of_any
@quality_options
@click.option(
    "--codes",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Pack the codes of a file of `edgekit quantize` as they are.",
)
@click.option(
    "--context", type=int, metavar="N", help="Positions to make room for  [default: 2048]"
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to make  [default: MODEL-TARGET-RECIPE]",
)
@click.option(
    "--abi",
    type=click.Choice(["genai", "transformersjs"]),
    default="genai",
    help="Whose names and folder an ONNX model has  [default: genai]",
)
@click.option("--portable", is_flag=True, help="ONNX's own operators only.")
@click.option(
    "--imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What `edgekit imatrix` or llama-imatrix measured, for llama.cpp's own formats.",
)
@module_options
@click.option(
    "--adapter",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A LoRA adapter (PEFT) to merge into the weights first.",
)
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
@click.option("--random-weights", is_flag=True, help="The model's shapes with random weights.")
@click.option("--dry-run", is_flag=True, help="Print what each tensor would be stored as; stop.")
@click.option("--force", is_flag=True, help="Replace an artifact of the same name.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor, not only the schemes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(
    model: str,
    target: str,
    choice: RecipeChoice,
    module: ModuleChoice,
    chosen: QualityChoice,
    codes: Path | None,
    context: int | None,
    output: Path | None,
    abi: Literal["genai", "transformersjs"],
    portable: bool,
    imatrix: Path | None,
    adapter: Path | None,
    revision: str | None,
    random_weights: bool,
    dry_run: bool,
    force: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Export MODEL (a name of `edgekit models`, a hub id or a local folder) for an engine.

    Quantizes once, writes the engine's file, runs it in the engine and compares its logits with
    the model's. The folder appears only when all of that has succeeded.

    With --codes nothing is quantized: the tensors are those of the file, which must be of MODEL.

    For target gguf --scheme also takes llama.cpp's own formats, which llama.cpp quantizes: Q4_0,
    Q8_0, Q4_K_M, Q5_K_M, Q6_K, IQ4_NL.

    FILE.py:FUNCTION is any other module: the file is executed, it is your own code, and the
    function, called without arguments, returns a torch.nn.Module that torch.export traces. It
    goes to executorch or onnx, activations quantized too by what --calibrate shows. With --codes
    the weights' codes are those of the file, and --calibrate is still needed.
    """
    from edgekit.common.interrupts import interrupts_end_the_process
    from edgekit.common.quiet import quiet_imports

    with interrupts_end_the_process():
        from edgekit.networks.user_code import Factory

    factory = Factory.parse(model)
    if factory is not None:
        refuse_for_a_module(
            context=context,
            abi=abi != "genai",
            portable=portable,
            imatrix=imatrix,
            adapter=adapter,
            revision=revision,
            random_weights=random_weights,
        )
        export_module_of(
            factory,
            target,
            choice,
            module,
            chosen,
            codes=codes,
            output=output,
            dry_run=dry_run,
            force=force,
            verbose=verbose,
            as_json=as_json,
        )
        return
    module.refuse_for_a_model()
    quality = chosen.of_a_model(choice, codes is not None)
    with interrupts_end_the_process(), quiet_imports():
        from edgekit.exporters.contract.layout import Options
        from edgekit.exporters.contract.own_formats import format_recipe
        from edgekit.formats.artifact.write import check_output
        from edgekit.quantize.recipe import warnings
        from edgekit.workflows.plan import plan_export

    if output is not None and not dry_run:
        check_output(output, force)  # a budget is measured before the plan is there
    form = choice.llama_format
    with resumable(quality), progress_line() as show:
        plan = plan_export(
            model,
            target,
            choice.recipe() if form is None else format_recipe(form),
            context,
            revision,
            random_weights=random_weights or (dry_run and quality.budget is None),
            options=Options(
                llama_format=form,
                imatrix=imatrix,
                abi=abi,
                portable=portable,
            ),
            codes=codes,
            quality=quality,
            steps=show,
            adapter=adapter,
        )
    label = choice.label if quality.budget is None else quality.budget.label
    label = label if codes is None else codes.stem
    folder = output or Path(f"{plan.source.short_name}-{target}-{label}")
    if not dry_run:
        check_output(folder, force)
    for warning in [*plan.source.notes(), *warnings(plan.table)]:
        click.echo(f"edgekit: warning: {warning}", err=True)
    if dry_run or not as_json:
        _show_plan(plan, every_tensor=dry_run or verbose, as_json=as_json)
    if dry_run:
        return
    with resumable(quality):
        manifest, made = _export(plan, folder, force, as_json)
    found = manifest.verification
    if not found["verified"]:
        click.echo(
            f"edgekit: warning: {folder} is not verified: {found['reason']}, then "
            f"edgekit verify {folder}",
            err=True,
        )
    if as_json:
        from edgekit.workflows.quantize import quality_dict

        facts = manifest.to_json() | quality_dict(plan.mixed, made)
        print_json({"artifact": str(folder), **facts})
    else:
        _show_result(folder, manifest)


def _export(
    plan: "Plan", folder: Path, force: bool, as_json: bool
) -> "tuple[Manifest, Quantized | None]":
    """Choose the codes, where that was asked for, and export them."""
    from edgekit.common.progress import stage_printer
    from edgekit.workflows.export import export_plan, with_codes
    from edgekit.workflows.quantize import quality_text

    with ExitStack() as stack:
        with progress_line() as show:
            ready, made = stack.enter_context(with_codes(plan, folder, show))
        if not as_json:
            click.echo("".join(f"{part}\n" for part in quality_text(plan.mixed, made)), nl=False)
        return export_plan(ready, folder, force, stage_printer()), made


def _show_plan(plan: "Plan", every_tensor: bool, as_json: bool) -> None:
    from edgekit.quantize.table import format_json, json_bytes, summary

    if as_json:
        tensors, total = plan.listing, json_bytes(plan.listing)
        print_json({"model": plan.source.id, "tensors": tensors, "bytes": total})
    else:
        click.echo(format_json(plan.listing) if every_tensor else summary(plan.listing))


def _show_result(folder: Path, manifest: "Manifest") -> None:
    from edgekit.exporters.verify.decoder import figures_text

    found = manifest.verification
    if found["verified"]:
        click.echo(f"\n{figures_text(found)}")
    click.echo(f"\n{size_line(folder, manifest.file)}")
