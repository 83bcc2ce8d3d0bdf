"""`edgekit fit`: will a model fit a device, and how fast can it decode at best."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._completion import devices, models
from edgekit.commands._json import print_json
from edgekit.commands._recipe_options import RecipeChoice, recipe_options
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.runtime.fit import Fit

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


@dataclass(frozen=True)
class _Target:
    """A device as a prediction needs it: RAM sizes in bytes, GB/s and what kind of figure it is."""

    device: str
    ram_bytes: tuple[int, ...]
    bandwidth: tuple[float, str] | None


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
    device = device.lower()
    target = _target(device, ram, bandwidth)
    fit, name, recipe = _predict(model, choice, context, depth)
    if device == LOCAL and bandwidth is None and not no_measure:
        target = replace(target, bandwidth=_measure())
    if as_json:
        print_json(_facts(fit, name, recipe, target))
    else:
        click.echo(_text(fit, name, recipe, target))


def _predict(
    model: str, choice: RecipeChoice, context: int | None, depth: int
) -> "tuple[Fit, str, str]":
    """Return the prediction, the model's name and the recipe's."""
    from edgekit.formats.artifact.read import MANIFEST

    if (Path(model) / MANIFEST).is_file():
        return _predict_artifact(Path(model), choice, context, depth)
    if Path(model).is_file():
        raise EdgekitError(
            f"{model}: is a single file, whose model fit does not know: give the folder that "
            "`edgekit export` wrote, or the model (a name, a hub id or a folder)"
        )
    return (*_predict_model(model, choice, context, depth), choice.label)


def _predict_artifact(
    path: Path, choice: RecipeChoice, context: int | None, depth: int
) -> "tuple[Fit, str, str]":
    from edgekit.runtime.artifact_fit import predict_artifact

    if choice.given or context is not None:
        raise EdgekitError(f"{path}: is an artifact, which has its recipe and --context already")
    return predict_artifact(path, depth)


def _predict_model(
    model: str, choice: RecipeChoice, context: int | None, depth: int
) -> "tuple[Fit, str]":
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.exporters.contract.stored import stored_rows
        from edgekit.exporters.contract.target import Options, find_target
        from edgekit.models.source import resolve_model
        from edgekit.quantize.recipe import resolve
        from edgekit.runtime.fit import predict

    source = resolve_model(model, random_weights=True)
    shapes, tied = source.config.tied_shapes()
    target = find_target("executorch", Options())
    rows = stored_rows(resolve(choice.recipe(), shapes), target.HELD_AS_SUCH)
    shared = target.stored_once(rows, tied)
    positions = context or source.config.default_context
    return predict(source.config, rows, positions, depth, shared=shared), source.id


def _target(device: str, ram: int | None, bandwidth: float | None) -> _Target:
    known = _this_machine() if device == LOCAL else _profile(device)
    return _Target(
        known.device,
        known.ram_bytes if ram is None else (ram,),
        known.bandwidth if bandwidth is None else (bandwidth, "given"),
    )


def _profile(name: str) -> _Target:
    from edgekit.devices.profile import find_profile
    from edgekit.devices.report import GIB

    profile = find_profile(name)
    ram = tuple(int(size * GIB) for size in profile.ram_gb)
    return _Target(profile.id, ram, profile.bandwidth)


def _this_machine() -> _Target:
    from edgekit.devices.probe.machine import probe

    ram = probe().ram_bytes
    return _Target(LOCAL, () if ram is None else (ram,), None)


def _measure() -> tuple[float, str]:
    """Measure; the load is told because other programs' reading lowers the figure."""
    from edgekit.common.plural import counted
    from edgekit.devices.probe.bandwidth import measure_read_bandwidth
    from edgekit.devices.probe.conditions import conditions

    load = conditions().load_average
    try:
        result = measure_read_bandwidth()
    except EdgekitError as error:
        raise EdgekitError(f"{error}, or give --no-measure") from error
    busy = "" if load is None else f" at load {load[0]:.1f}"
    return result.gb_per_s, f"measured with {counted(result.threads, 'thread')}{busy}"


def _facts(fit: "Fit", name: str, recipe: str, target: _Target) -> dict[str, Any]:
    speed = None if target.bandwidth is None else target.bandwidth[0]
    return {
        "model": name,
        "recipe": recipe,
        "device": target.device,
        "bytes": fit.to_dict(),
        "ram": [{"bytes": size, "verdict": fit.verdict(size)} for size in target.ram_bytes],
        "bandwidth_gb_per_s": speed,
        "bandwidth_kind": target.bandwidth and target.bandwidth[1],
        "decode_ceiling_tok_per_s": speed and fit.decode_ceiling(speed),
    }


def _text(fit: "Fit", name: str, recipe: str, target: _Target) -> str:
    from edgekit.runtime.fit_table import fit_text

    title = f"{name}, {recipe}, on {target.device}"
    return fit_text(fit, title, target.ram_bytes, target.bandwidth)
