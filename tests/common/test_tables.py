"""Tables fit where they are shown."""

import pytest

from edgekit.common.tables import WIDTH, fitting_table, in_lines, markdown_table

HEADERS = ["artifact", "test", *(f"figure {number}" for number in range(9))]
ROWS = [["a" * 20, "pp512", *(f"{number}.25" for number in range(9))], ["b", "tg128", *["-"] * 9]]


def test_what_has_room_is_one_table() -> None:
    narrow = [row[:4] for row in (HEADERS, *ROWS)]
    assert fitting_table(narrow[0], narrow[1:]) == markdown_table(narrow[0], narrow[1:])


@pytest.mark.parametrize(("columns", "parts"), [(None, 2), ("200", 1), ("60", 5), ("10", 9)])
def test_columns_without_room_come_below(
    columns: str | None, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    tables = fitting_table(HEADERS, ROWS, keys=2).split("\n\n")
    assert len(tables) == parts
    shown = []
    for table in tables:
        lines = table.splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        assert [row[:2] for row in (cells[0], *cells[2:])] == [row[:2] for row in (HEADERS, *ROWS)]
        assert len(lines[0]) <= int(columns or WIDTH) or len(cells[0]) == 3
        shown += list(zip(*(row[2:] for row in (cells[0], *cells[2:])), strict=True))
    assert shown == list(zip(*(row[2:] for row in (HEADERS, *ROWS)), strict=True))


def test_a_side_that_is_named_holds_in_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    tables = fitting_table(HEADERS, ROWS, "ll" + "r" * 9, keys=2).split("\n\n")
    for table in tables:
        assert all(rule.strip().endswith(":") for rule in table.splitlines()[1].split("|")[3:-1])


def test_a_long_line_is_broken_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    lines = in_lines("word " * 60).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line.startswith("  word") for line in lines[1:])
