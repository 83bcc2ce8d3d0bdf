"""`edgekit fit`: will a model fit a device, and how fast can it decode at best."""

from dataclasses import replace

import click

from edgekit.commands._completion import devices, models, targets
from edgekit.commands._flags import with_flags
from edgekit.commands._json import print_json
from edgekit.commands._recipe_options import RecipeChoice, recipe_options

LOCAL = "local"


def _positive(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Refuse what is no size: click's FloatRange lets `nan` through."""
    if value is not None and not 0 < value < 1e9:
        raise click.BadParameter(f"{value:g} is not a number above 0")
    return value


def _ram_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    from edgekit.common.sizes import parse_size

    if value is None:
        return None
    size = parse_size(value, unit="GiB")
    if size is None:
        raise click.BadParameter(f"{value!r:.40} is no size, such as 8 (GB), 512MB")
    return size


@click.command("fit", short_help="Predict memory and decode speed on a device.")
@click.argument("model", metavar="MODEL|ARTIFACT", shell_complete=models)
@click.option(
    "--device",
    metavar="NAME",
    shell_complete=devices,
    default=LOCAL,
    show_default=True,
    help="A device that `edgekit devices` lists; local is this machine.",
)
@click.option(
    "--target",
    metavar="TARGET",
    shell_complete=targets,
    help="executorch, gguf or onnx: whose file and engine  [default: executorch]",
)
@recipe_options
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Positions of the caches  [default: 2048, or the model's limit]",
)
@click.option(
    "--depth",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    show_default=True,
    help="Positions before the decoded token.",
)
@click.option(
    "--ram",
    callback=_ram_bytes,
    metavar="SIZE",
    help="Judge against this much RAM, such as 8 (GB, of 2^30 bytes), 512MB.",
)
@click.option(
    "--bandwidth",
    type=float,
    callback=_positive,
    metavar="GB/S",
    help="Use this instead of the known bandwidth.",
)
@click.option(
    "--no-measure", is_flag=True, help="Leave this machine's bandwidth, and so speed, unknown."
)
@click.option("--json", "as_json", is_flag=True, help="Print the prediction as JSON.")
def command(
    model: str,
    device: str,
    target: str | None,
    choice: RecipeChoice,
    context: int | None,
    depth: int,
    ram: int | None,
    bandwidth: float | None,
    no_measure: bool,
    as_json: bool,
) -> None:
    """Predict the memory and the decode ceiling of MODEL on a device, before any export.

    No weights are needed. MODEL is a name that `edgekit models` lists, a hub id or a folder. Of an
    ARTIFACT, its own table, size and context count, in the engine it was made for.
    """
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.workflows.fit import fit

    found = fit(
        model,
        device=device,
        target=target,
        recipe=choice.recipe() if choice.given else None,
        context=context,
        depth=depth,
        ram_bytes=ram,
        bandwidth=bandwidth,
        measure=not no_measure,
    )
    if choice.given:
        found = replace(found, recipe=choice.label)
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo(with_flags(found.text()))
