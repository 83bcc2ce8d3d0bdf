"""The line of progress of long commands: rewritten on a terminal, now and then one in a log."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgekit.common.progress import Steps


@contextmanager
def progress_line() -> "Iterator[Steps]":
    """Give what shows steps on stderr.

    On a terminal it rewrites one line, cleared at the end however the work ends.
    """
    from edgekit.common.progress import Log, somebody_looks

    if not somebody_looks():
        log = Log()
        yield lambda done, total, label: log.print(_line(done, total, label))
        return
    try:
        yield _show
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


def _show(done: int, total: int, label: str) -> None:
    click.echo(f"\r\x1b[K{_line(done, total, label)}", nl=False, err=True)


def _line(done: int, total: int, label: str) -> str:
    return f"[{done}/{total}] {label}"
