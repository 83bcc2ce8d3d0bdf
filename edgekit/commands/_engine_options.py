"""The options of commands that open engines."""

import click

threads_option = click.option(
    "-t", "--threads", type=int, help="CPU threads, 4 per CPU at most  [default: physical cores]"
)
