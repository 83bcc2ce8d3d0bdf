"""The options of commands that open engines."""

from pathlib import Path

import click

threads_option = click.option(
    "-t",
    "--threads",
    type=int,
    help="CPU threads, 4 per CPU at most  [default: physical cores, fewer under a CPU quota]",
)
tokenizer_option = click.option(
    "--tokenizer",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="For files: a tokenizer.json, or the folder that holds it  [default: their own]",
)
