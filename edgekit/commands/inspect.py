"""`edgekit inspect`: what an artifact is made of, and which tensors of a model cost the most."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from edgekit.commands._json import print_json
from edgekit.commands._progress import progress_line
from edgekit.errors import EdgekitError, Interrupted


@click.command("inspect", short_help="Show what a file is made of.")
@click.argument("artifact", metavar="ARTIFACT|MODEL")
@click.option("--check", is_flag=True, help="Compare every file with the sha256 in the manifest.")
@click.option(
    "--sensitivity", is_flag=True, help="Rank the model's tensors by what quantizing each costs."
)
@click.option("--scheme", metavar="NAME", help="With --sensitivity  [default: w4g32]")
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="With --sensitivity: UTF-8 file to measure on  [default: a built-in text]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(
    artifact: str,
    check: bool,
    sensitivity: bool,
    scheme: str | None,
    text_file: Path | None,
    as_json: bool,
) -> None:
    """Show what ARTIFACT, an exported folder or a .pte, .gguf or .onnx file, is made of.

    Bytes by component, schemes, delegates, operators that run outside them, metadata and the
    figures of the verification. With --check, a damaged file ends in exit status 1. Of a saved
    calibration .json, the ranges.

    With --sensitivity, of a MODEL or the model that ARTIFACT was made of: how far the float model
    strays when one tensor alone is quantized. Figures are kept in the user's cache, tensor by
    tensor; an interrupted run goes on where it stopped.
    """
    if sensitivity and check:
        raise EdgekitError("--check and --sensitivity exclude each other")
    if not sensitivity and (scheme is not None or text_file is not None):
        raise EdgekitError("--scheme and --text are for --sensitivity")
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.workflows.inspect import inspect_file, rank_tensors

    if sensitivity:
        with _resumable(), progress_line() as show:
            report = rank_tensors(artifact, scheme, text_file, show)
    else:
        report = inspect_file(artifact, check)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.text())


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; the figures so far are kept: the same command goes on from there"
        ) from None
