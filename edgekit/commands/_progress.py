"""The line of progress of long commands, where somebody is looking at a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgekit.progress import Steps


@contextmanager
def progress_line() -> "Iterator[Steps | None]":
    """Give what rewrites one line of stderr, cleared at the end however the work ends.

    None where nobody looks.
    """
    from edgekit.progress import somebody_looks

    if not somebody_looks():
        yield None
        return
    try:
        yield _show
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


def _show(done: int, total: int, label: str) -> None:
    click.echo(f"\r\x1b[K[{done}/{total}] {label}", nl=False, err=True)
