"""`edgekit verify`: run an artifact in its engine and compare it with the model."""

from pathlib import Path

import click

from edgekit.commands._completion import models
from edgekit.commands._json import print_json


@click.command("verify", short_help="Run an artifact in its engine and compare it with its model.")
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--model",
    metavar="MODEL",
    shell_complete=models,
    help="Where the weights are  [default: what the manifest names]",
)
@click.option(
    "--adapter",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The LoRA adapter that was merged into it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(artifact: Path, model: str | None, adapter: Path | None, as_json: bool) -> None:
    """Compare ARTIFACT, run in its engine, with the model it was made of.

    For an artifact that was exported where its engine was not installed, or on another machine.
    The figures go into its manifest. An artifact of a module keeps some inputs and outputs to
    compare with, and needs no MODEL; its manifest keeps what its export verified. A file that
    computes something else ends in exit status 1.
    """
    from edgekit.common.interrupts import interrupts_end_the_process
    from edgekit.common.quiet import quiet_imports

    with interrupts_end_the_process(), quiet_imports():
        from edgekit.common.progress import stage_printer
        from edgekit.exporters.verify import decoder as verify
        from edgekit.exporters.verify import network as verify_module
        from edgekit.formats.artifact.manifest import NetworkManifest
        from edgekit.workflows.verify import verify_artifact

    manifest = verify_artifact(artifact, model, stage_printer(), adapter)
    if as_json:
        print_json({"artifact": str(artifact), **manifest.to_json()})
    else:
        kind = verify_module if isinstance(manifest, NetworkManifest) else verify
        click.echo(kind.figures_text(manifest.verification))
