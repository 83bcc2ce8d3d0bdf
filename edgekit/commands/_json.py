"""How every command prints JSON."""

import json

import click


def print_json(value: object) -> None:
    """Print a value as JSON that every parser reads: Python's NaN and Infinity are a defect."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def print_json_line(value: object) -> None:
    """Print a value as one line of JSON, at once, for a reader that follows along."""
    click.echo(json.dumps(value, allow_nan=False))
