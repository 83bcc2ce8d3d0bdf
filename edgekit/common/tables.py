"""Aligned tables, as Markdown or plain: the two ways in which every command prints rows."""

import shutil
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

WIDTH = 100
"""Columns that a table may take where it does not go to a terminal."""


def in_lines(text: str) -> str:
    """Return a text in lines that fit as tables do, the ones after the first indented."""
    return textwrap.fill(text, line_width(), subsequent_indent="  ", break_on_hyphens=False)


def line_width() -> int:
    """Return the terminal's columns, or `WIDTH` where the output goes elsewhere."""
    return shutil.get_terminal_size((WIDTH, 0)).columns


def fitting_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "", keys: int = 1
) -> str:
    """Return a Markdown table that fits the terminal, or `WIDTH` columns where there is none.

    Columns that have no room make a table below, which begins with the first `keys` columns again.
    """
    width = line_width()
    align = align.ljust(len(headers))
    parts, shown = [], [*range(keys)]
    for column in range(keys, len(headers)):
        wider = _of_columns(headers, rows, align, [*shown, column])
        if len(shown) > keys and len(wider.partition("\n")[0]) > width:
            parts.append(_of_columns(headers, rows, align, shown))
            shown = [*range(keys)]
        shown.append(column)
    return "\n\n".join([*parts, _of_columns(headers, rows, align, shown)])


def _of_columns(
    headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, columns: Sequence[int]
) -> str:
    cells = [[row[column] for column in columns] for row in (headers, *rows)]
    return markdown_table(cells[0], cells[1:], "".join(align[column] for column in columns))


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return a Markdown table whose columns line up in a terminal too.

    `align` holds a letter per column, `l` or `r`. Columns that have none or a space are
    right-aligned when every cell in them starts like a number, and left-aligned otherwise. A `|`,
    a line break or what could steer a terminal in a cell cannot break the table. No newline at the
    end.

    Raises `ValueError` when a row and the headers differ in length or `align` is malformed.
    """
    if len(align) > len(headers) or set(align) - {"l", "r", " "}:
        raise ValueError(f"align must be at most {len(headers)} letters l or r: {align!r}")
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"{len(headers)} headers but a row of {len(row)} cells: {row!r}")
    cells = [[_escape(cell) for cell in row] for row in (headers, *rows)]
    columns = list(zip(*cells, strict=True))
    sides = [
        (side or "").strip() or _natural_side(column[1:])
        for column, side in zip_longest(columns, align)
    ]
    widths = [max(3, *map(len, column)) for column in columns]
    lines = [_line(row, widths, sides) for row in cells]
    rule = [_rule(width, side) for width, side in zip(widths, sides, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def plain_table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Return rows of equal length as lines of columns two spaces apart.

    `align` holds one letter per column, `l` or `r`. No newline at the end, no space before one.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_padded(row, widths, align)).rstrip() for row in rows)


def _escape(cell: str) -> str:
    shown = "".join(char if char.isprintable() else "?" for char in " ".join(cell.split("\n")))
    return shown.replace("|", "\\|")


def _natural_side(cells: Sequence[str]) -> str:
    """Numbers go right, so that digits line up; an empty cell or a dash says nothing."""
    said = [cell for cell in cells if cell not in ("", "-")]
    return "r" if said and all(cell.lstrip("+-~<>")[:1].isdigit() for cell in said) else "l"


def _rule(width: int, side: str) -> str:
    return "-" * (width - 1) + ":" if side == "r" else "-" * width


def _line(row: Sequence[str], widths: Sequence[int], sides: Sequence[str]) -> str:
    return "| " + " | ".join(_padded(row, widths, sides)) + " |"


def _padded(row: Sequence[str], widths: Sequence[int], sides: Sequence[str]) -> list[str]:
    return [
        cell.rjust(width) if side == "r" else cell.ljust(width)
        for cell, width, side in zip(row, widths, sides, strict=True)
    ]
