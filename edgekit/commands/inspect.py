"""`edgekit inspect`: what an artifact is made of."""

from pathlib import Path

import click

from edgekit.commands._json import print_json


@click.command("inspect", short_help="Show what a file is made of.")
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Compare every file with the sha256 in the manifest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(artifact: Path, check: bool, as_json: bool) -> None:
    """Show what ARTIFACT, an exported folder or a .pte file, is made of.

    Bytes by component, schemes, delegates, operators that run outside them, metadata and the
    figures of the verification. With --check, a damaged file ends in exit status 1.
    """
    from edgekit.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.exporters.inspect import inspect

    report = inspect(artifact, check)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.text())
