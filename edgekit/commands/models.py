"""`edgekit models`: the models known by name, and which of them lie on this machine."""

import dataclasses
from typing import TYPE_CHECKING

import click

from edgekit.commands._json import print_json

if TYPE_CHECKING:
    from edgekit.models.source import ModelRow


@click.command("models", short_help="List the models known by name.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of the table.")
def command(as_json: bool) -> None:
    """List the models known by name: parameters, licence, hub id, and what is local."""
    from edgekit.common.interrupts import interrupts_end_the_process

    with interrupts_end_the_process():  # nothing is written: all of it may be cut short
        from edgekit.models.source import list_models

        rows = list_models()
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        click.echo(_table(rows))


def _table(rows: "list[ModelRow]") -> str:
    from edgekit.common.tables import plain_table

    lines = [("name", "parameters", "licence", "hub id", "local")]
    for row in rows:
        names = ", ".join((row.name, *row.aliases))
        place = row.hub_id or "(bundled)"
        lines.append((names, f"{row.parameters:,}", row.licence, place, _size(row.local_bytes)))
    return plain_table(lines, "lrlll")


def _size(count: int | None) -> str:
    return "no" if count is None else f"yes, {count / 1e6:,.0f} MB"
