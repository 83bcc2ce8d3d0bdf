"""The `edgekit` command: a click group whose commands live one per file in edgekit/commands.

Command files import click alone, so `edgekit --help` answers at once; each imports its work
(torch, executorch, ...) inside the function that needs it.

No traceback reaches a user: every error is one line on stderr. Exit status: 0 success, 1 a failed
verification, 2 a mistake or a machine that cannot do it (full disk, no memory), 70 a defect of
edgekit, 130 Ctrl-C, 141 a reader that closed the pipe. EDGEKIT_TRACEBACK=1 gives the tracebacks.
"""

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from edgekit import __version__
from edgekit.errors import EdgekitError

COMMANDS = ("export", "run", "bench", "inspect", "quantize", "fit", "models", "devices")

MISTAKE = 2
DEFECT = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
READER_GONE = 141  # 128 + SIGPIPE


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

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what click's own returns
        """Run the command; an error ends it with one line and an exit status."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise  # click's own: it prints the usage
        except EdgekitError as error:
            _end(str(error), error.exit_status)
        except KeyboardInterrupt:
            _end("interrupted", INTERRUPTED)
        except BrokenPipeError:
            _forget_stdout()
            sys.exit(READER_GONE)
        except Exception as error:
            if os.environ.get("EDGEKIT_TRACEBACK"):
                raise
            _end(*describe(error))


def describe(error: Exception) -> tuple[str, int]:
    """Return one line and the exit status for an error that no command foresaw."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}", MISTAKE
    # torch reports a failed allocation as a RuntimeError of this text.
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "not enough memory", MISTAKE
    kind = type(error).__name__
    return f"internal error: {kind}: {text[:300]} (EDGEKIT_TRACEBACK=1 shows where)", DEFECT


def _end(message: str, status: int) -> NoReturn:
    click.echo(f"edgekit: {message}", err=True)
    sys.exit(status)


def _forget_stdout() -> None:
    """Let the interpreter's last flush succeed, or it would report the closed pipe again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Export language models to edge engines, prove each file, run it and measure it."""
