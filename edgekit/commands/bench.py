"""`edgekit bench`: prefill and decode speed, latency, load time and memory of artifacts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._engine_options import threads_option
from edgekit.commands._progress import progress_line
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.runtime.bench.record import Record


def _counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Read whole numbers separated by commas, as llama-bench takes them: `128,512`."""
    parts = value.split(",")
    if not all(part.strip().isdecimal() and len(part) <= 9 for part in parts):
        raise click.BadParameter(f"{value!r:.60} is not a list of whole numbers such as 128,512")
    return tuple(int(part) for part in parts)


def _rest(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse what is no duration: click's FloatRange lets `nan` through."""
    if not 0 <= value <= 3600:
        raise click.BadParameter(f"{value:g} is not a number from 0 to 3600")
    return value


@click.command("bench", short_help="Measure prefill and decode speed, latency, memory.")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt",
    "prompts",
    metavar="N[,N...]",
    callback=_counts,
    default="512",
    show_default=True,
    help="Tokens to prefill; 0 skips.",
)
@click.option(
    "-n",
    "--generate",
    "generates",
    metavar="N[,N...]",
    callback=_counts,
    default="128",
    show_default=True,
    help="Tokens to decode; 0 skips.",
)
@click.option(
    "-d",
    "--depth",
    "depths",
    metavar="N[,N...]",
    callback=_counts,
    default="0",
    show_default=True,
    help="Tokens already in the state, filled outside the time.",
)
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1, 1_000_000),
    default=5,
    show_default=True,
    help="Timed repetitions of each test, after one warm-up.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    help="Inputs of a module's run  [default: 1, or the only batch it takes]",
)
@threads_option
@click.option(
    "--cooldown",
    "cooldown_s",
    metavar="SECONDS",
    type=float,
    callback=_rest,
    default=0.0,
    help="Rest before every repetition.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Seed of the token ids.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of the tables.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the JSON record to a file.",
)
@click.option("--force", is_flag=True, help="Overwrite the file of --output.")
def command(
    artifacts: tuple[Path, ...],
    prompts: tuple[int, ...],
    generates: tuple[int, ...],
    depths: tuple[int, ...],
    repetitions: int,
    batch: int | None,
    threads: int | None,
    cooldown_s: float,
    seed: int,
    as_json: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Measure ARTIFACT folders by llama-bench's conventions.

    .gguf, .pte and .onnx files and onnxruntime-genai folders that others made are taken, too.
    Token ids are random, one warm-up precedes each test, and every repetition starts from a fresh
    state. -p, -n and -d take several values: -p 128,512. Several artifacts are measured in turn,
    repetition by repetition, and compared with the first.

    Of modules the latency of a run is measured, in bursts of a tenth of a second a repetition;
    -p, -n and -d are not for them.
    """
    from edgekit.common.files import check_output_file
    from edgekit.common.interrupts import interrupts_end_the_process

    if output is not None:  # before the measuring, which may take long
        check_output_file(output, force)

    with interrupts_end_the_process():
        from edgekit.runtime.bench.decoder import bench
        from edgekit.runtime.bench.network import all_modules, bench_modules
        from edgekit.runtime.bench.tables import render

    modules = all_modules(artifacts)
    _refuse_options_of_the_other_kind(artifacts[0], modules, batch)
    with progress_line() as show:
        how: dict[str, Any] = {
            "repetitions": repetitions,
            "threads": threads,
            "cooldown_s": cooldown_s,
            "seed": seed,
            "progress": show,
        }
        record: Record[Any] = (
            bench_modules(artifacts, batch, **how)
            if modules
            else bench(artifacts, prompts, generates, depths, **how)
        )
    try:
        # Of JSON the record and nothing else, equal to the file.
        click.echo(record.to_json() if as_json else render(record))
    finally:  # what took long is kept in one place where the other is full or gone
        if output is not None:
            record.save(output)
    if output is not None and not as_json:
        click.echo(f"\nwrote {output}")


def _refuse_options_of_the_other_kind(first: Path, modules: bool, batch: int | None) -> None:
    if batch is not None and not modules:
        raise EdgekitError("--batch is for modules")
    context = click.get_current_context()
    for name, option in (("prompts", "-p"), ("generates", "-n"), ("depths", "-d")):
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if modules and given:
            raise EdgekitError(f"{option} is for language models, {first} is a module")
