"""How a target without codebooks stores them: each code looked up, as int8.

Codebooks of `edgekit.quantize` have int8 entries, so that the product with the scale is the same
number and the engine's 8-bit kernels run it; only the bits saved are lost, which the table says. So
it is with codes of 5 and 6 bits, for which only GGUF has a form.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.table import table_json


def stored(table: Table) -> Table:
    """Return a table as the file holds it."""
    return replace(table, rows=[_stored(row, table.native) for row in table])


def _stored(row: Resolved, native: Collection[str]) -> Resolved:
    scheme = row.scheme.as_int8
    if scheme == row.scheme or row.scheme.name in native:
        return row
    return replace(row, scheme=scheme, nbytes=scheme.nbytes(row.shape))


def stored_json(table: Table) -> list[dict[str, Any]]:
    """Return `table_json` with the bytes of the file; `stored_as` is in a row that it changes."""
    found = table_json(table)
    for entry, row, held in zip(found, table, stored(table), strict=True):
        if held is not row:
            entry |= {"stored_as": held.scheme.name, "bytes": held.nbytes}
    return found


def refusal(error: EdgekitError, table: Table) -> EdgekitError:
    """Return a target's refusal of what it was to hold, with the scheme that was asked for."""
    for row, held in zip(table, stored(table), strict=True):
        if held is not row and str(error).startswith(f"{row.tensor}:"):
            name, form = row.scheme.name, held.scheme.name
            has_books = isinstance(row.scheme, Codebook)
            what = "its entries as int8 codes" if has_books else "its codes as int8"
            why = str(error).removeprefix(f"{row.tensor}: ")
            hint = "" if has_books else f"; target gguf holds {name} as such"
            return EdgekitError(
                f"{row.tensor}: {name} is stored as {form}, {what}, but {why}{hint}"
            )
    return error
