"""What `export` and `quantize` do for a module of the user's."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._json import print_json
from edgekit.commands._module_options import ModuleChoice, calibration_data
from edgekit.commands._quality_options import QualityChoice
from edgekit.commands._recipe_options import RecipeChoice
from edgekit.commands._size import size_line
from edgekit.errors import QuantizationWarning

if TYPE_CHECKING:
    from edgekit.common.progress import Progress
    from edgekit.networks.user_code import Factory
    from edgekit.quantize.traced.placement import Placement
    from edgekit.workflows.export_network import Quantized


def export_module_of(
    factory: "Factory",
    target: str,
    choice: RecipeChoice,
    module: ModuleChoice,
    chosen: QualityChoice,
    *,
    codes: Path | None,
    output: Path | None,
    dry_run: bool,
    force: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Export the module that a function returns, or show what would be stored."""
    from edgekit.common.interrupts import interrupts_end_the_process
    from edgekit.common.quiet import quiet_imports

    with interrupts_end_the_process(), quiet_imports():
        from edgekit.common.progress import stage_printer
        from edgekit.exporters.contract.network_target import find_module_target, rows_text
        from edgekit.exporters.verify import network as verify_module
        from edgekit.formats.artifact.write import check_output
        from edgekit.quantize.table import summary
        from edgekit.workflows.export_network import export_network
        from edgekit.workflows.quality import Quality, check_exclusions

    chosen.refuse_budget()
    check_exclusions(Quality(), choice.option if choice.given else None, codes=codes is not None)
    label = choice.label if codes is None else codes.stem
    folder = output or Path(f"{_last(factory)}-{target}-{label}")
    writer = find_module_target(target)
    if not dry_run:
        check_output(folder, force)
    progress = stage_printer()
    name, placement, rows = _plan(factory, choice, module, progress, codes)
    writer.check_layers(placement.traced, placement.schemes())
    if dry_run:
        _show_plan(name, rows, as_json)
        return
    found = _quantize(placement, chosen, progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantizationWarning)  # said below, in a line
        artifact = export_network(
            found.network,
            found.sample,
            folder,
            target=target,
            name=name,
            recipe=placement.recipe,
            force=force,
            progress=progress,
        )
    for warning in verify_module.warnings(artifact.network):
        click.echo(f"edgekit: warning: {warning}", err=True)
    if as_json:
        print_json({"artifact": str(folder), **artifact.manifest.to_json()})
        return
    click.echo(rows_text(rows) if verbose else summary(rows))
    click.echo(f"\n{verify_module.figures_text(artifact.manifest.verification)}")
    click.echo(f"\n{size_line(folder, artifact.manifest.file)}")


def quantize_module_of(
    factory: "Factory",
    choice: RecipeChoice,
    module: ModuleChoice,
    chosen: QualityChoice,
    *,
    output: Path | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the codes of a module's weights, and beside them the calibration."""
    from edgekit.common.interrupts import interrupts_end_the_process
    from edgekit.common.quiet import quiet_imports

    with interrupts_end_the_process(), quiet_imports():
        from edgekit.common.files import check_output_file
        from edgekit.common.progress import stage_printer
        from edgekit.exporters.contract.network_target import rows_text
        from edgekit.networks.codes import save_codes

    chosen.refuse_budget()
    path = output or Path(f"{_last(factory)}-{choice.label}.safetensors")
    ranges = path.with_suffix(".calibration.json")
    if not dry_run:
        check_output_file(path, force)
        check_output_file(ranges, force)
    progress = stage_printer()
    name, placement, rows = _plan(factory, choice, module, progress)
    if dry_run:
        _show_plan(name, rows, as_json)
        return
    found = _quantize(placement, chosen, progress)
    written = [str(path)]
    if found.network.calibration is not None:
        found.network.calibration.save(ranges)
        written.append(str(ranges))
    try:
        save_codes(found.network, placement, name, path)
    except BaseException:  # codes without their ranges, and ranges without codes, are no result
        if found.network.calibration is not None:
            ranges.unlink(missing_ok=True)
        raise
    if as_json:
        total = sum(row["bytes"] for row in rows)
        print_json({"model": name, "tensors": rows, "bytes": total, "files": written})
    else:
        click.echo(rows_text(rows))
        click.echo(f"wrote {' and '.join(written)}")


def _plan(
    factory: "Factory",
    choice: RecipeChoice,
    module: ModuleChoice,
    progress: "Progress",
    codes: Path | None = None,
) -> "tuple[str, Placement, list[dict[str, Any]]]":
    """Return the module's name, what is to be quantized in it, and the table of that."""
    from edgekit.exporters.contract.network_target import tensor_rows

    progress("tracing")
    name, placement = module.place(factory, choice, codes)
    return name, placement, tensor_rows(placement.traced, placement.schemes())


def _quantize(placement: "Placement", chosen: QualityChoice, progress: "Progress") -> "Quantized":
    from edgekit.workflows.export_network import quantize_placement

    data = calibration_data(chosen, placement)
    return quantize_placement(placement, data, chosen.method or "moving-average", progress)


def _show_plan(name: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    from edgekit.exporters.contract.network_target import rows_text

    if as_json:
        total = sum(row["bytes"] for row in rows)
        print_json({"model": name, "tensors": rows, "bytes": total})
    else:
        click.echo(rows_text(rows))


def _last(factory: "Factory") -> str:
    """Return the file's name without its end, what default names of outputs begin with."""
    return factory.file.stem.lower()
