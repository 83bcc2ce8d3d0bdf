"""The `edgekit` command: a click group whose commands live one per file in edgekit/commands.

Command files import click alone, so `edgekit --help` answers at once; each imports its work
(torch, executorch, ...) inside the function that needs it.
"""

import importlib
import sys
from typing import Any

import click

from edgekit import __version__
from edgekit.errors import EdgekitError

COMMANDS = ("export", "run", "bench", "inspect", "quantize", "fit", "models", "devices")


class Commands(click.Group):
    """Imports edgekit/commands/NAME.py when NAME is asked for, and turns errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None where there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgekit.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an `EdgekitError` ends it with its message and exit status."""
        try:
            return super().invoke(ctx)
        except EdgekitError as error:
            click.echo(f"edgekit: {error}", err=True)
            sys.exit(error.exit_status)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Export language models to edge engines, prove each file, run it and measure it."""
