"""The `edgekit` command: a click group whose commands live one per file in edgekit/commands.

Command files import click alone, so `edgekit --help` answers at once; each imports its work
(torch, executorch, ...) inside the function that needs it.

No traceback reaches a user: every error is one printable line on stderr, whatever stands in the
names that it repeats. Exit status: 0 success, 1 a failed verification or a crash of a native
library, 2 a mistake or a machine that cannot do it (full disk, no memory), 70 a defect of edgekit,
130 Ctrl-C, 141 a reader that closed the pipe, 143 SIGTERM. With --json the last line of stdout is a
JSON object that says the same. EDGEKIT_TRACEBACK=1 gives the tracebacks.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import click

from edgekit.devices.cpus import share_cpus_well
from edgekit.errors import (
    EdgekitError,
    Terminated,
    json_for_program,
    line_for_user,
    text_of,
    wants_json,
)
from edgekit.version import __version__

COMMANDS = (
    "export",
    "verify",
    "run",
    "bench",
    "eval",
    "compare",
    "inspect",
    "quantize",
    "imatrix",
    "fit",
    "models",
    "devices",
)

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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown name is answered with those that it may have meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:  # click looks among imported commands only
            raise click.exceptions.NoSuchCommand(
                error.command_name, possibilities=COMMANDS, ctx=ctx
            ) from None

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,  # noqa: ANN401
    ) -> click.Context:
        """Read edgekit's own arguments, of which --help and --version already write."""
        with _errors_in_one_line(wants_json(args)):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - what click's own returns
        """Run the command; an error ends it with one line and an exit status."""
        share_cpus_well()  # before any command loads torch or an engine
        with _errors_in_one_line(wants_json(ctx.args)):
            return super().invoke(ctx)


@contextmanager
def _errors_in_one_line(as_json: bool) -> Iterator[None]:
    try:
        yield
    except (click.Abort, click.exceptions.Exit, click.exceptions.NoArgsIsHelpError):
        raise  # no errors, but click's own ways to end
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        message = f"{error.format_message()}{hint}"
        _end(message, error.exit_code, as_json, _field_of_usage(error) if as_json else None)
    except EdgekitError as error:
        from edgekit.commands._flags import field_in, with_flags

        message = with_flags(str(error))
        _end(message, error.exit_status, as_json, error.field or field_in(message))
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED, as_json)
    except Terminated as error:
        _end("terminated", error.exit_status, as_json)
    except BrokenPipeError:
        _discard(sys.stdout)
        sys.exit(READER_GONE)
    except Exception as error:
        if os.environ.get("EDGEKIT_TRACEBACK"):
            raise
        _end(*describe(error), as_json)


def describe(error: Exception) -> tuple[str, int]:
    """Return one line and the exit status for an error that no command foresaw."""
    text = " ".join(text_of(error).split())
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}", MISTAKE
    # torch reports a failed allocation as a RuntimeError of this text.
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "not enough memory", MISTAKE
    kind = type(error).__name__
    return f"internal error: {kind}: {text[:300]} (EDGEKIT_TRACEBACK=1 shows where)", DEFECT


def _field_of_usage(error: click.ClickException) -> str | None:
    """Return the argument that click refuses, None where it is about none or about several."""
    from edgekit.commands._flags import field_in

    parameter = getattr(error, "param", None)
    if isinstance(parameter, click.Argument):
        return parameter.name
    if isinstance(parameter, click.Option):
        return field_in(max(parameter.opts, key=len)) or parameter.name
    return field_in(error.format_message())


def _end(message: str, status: int, as_json: bool, field: str | None = None) -> NoReturn:
    """Print the one line; what cannot be written is let go, for there is no other place for it."""
    if as_json:
        with suppress(OSError):
            click.echo(json_for_program(message, status, field))
    with suppress(OSError):
        click.echo(line_for_user(message), err=True)
    for stream in (sys.stdout, sys.stderr):
        _flush_or_discard(stream)
    sys.exit(status)


def _flush_or_discard(stream: TextIO | None) -> None:
    try:
        if stream is not None:
            stream.flush()
    except OSError:  # a full disk, or a reader that is gone
        _discard(stream)


def _discard(stream: TextIO | None) -> None:
    """Let the interpreter's last flush succeed, or it would report the error again."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
def main() -> None:
    """Export language models and modules to edge engines, prove, run and measure each file."""
