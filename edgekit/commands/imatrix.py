"""`edgekit imatrix`: which inputs of a model's linears matter, for llama.cpp's formats."""

from pathlib import Path

import click

from edgekit.commands._json import print_json
from edgekit.commands._progress import progress_line


@click.command("imatrix", short_help="Measure on a text what llama.cpp's formats should spare.")
@click.argument("model")
@click.option(
    "--text",
    "text_file",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 file like what the model will be used on.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where to write  [default: MODEL-imatrix.gguf]",
)
@click.option(
    "--context", type=int, default=512, show_default=True, help="Tokens in a chunk of the text."
)
@click.option("--chunks", type=click.IntRange(min=1), help="Most chunks to run  [default: all]")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a sentence.")
def command(
    model: str,
    text_file: Path,
    output: Path | None,
    context: int,
    chunks: int | None,
    revision: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run MODEL (a name of `edgekit models`, a hub id or a local folder), float, over a text.

    Writes the mean square of every linear's inputs as llama-imatrix does; then
    `edgekit export MODEL --target gguf --scheme Q4_K_M --imatrix FILE`, or llama-quantize, gives
    the columns that see large inputs the smaller errors.
    """
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():
        from edgekit.workflows.importance import write_imatrix

    with progress_line() as show:
        written = write_imatrix(
            model,
            text_file,
            output,
            context=context,
            chunks=chunks,
            revision=revision,
            force=force,
            progress=show,
        )
    if as_json:
        print_json(written.to_dict())
    else:
        click.echo(written.sentence())
