"""Codebooks, scales and indices that fit a weight, from its values alone.

A row, or a group of columns of it, is divided by its scale; the codebook is the k-means of what is
left. Indices, scales and codebook are then improved in turn, each for the others as they are, so
the error never grows. What is returned lies on the grids that are stored: entries of int8
(`edgekit.quantize.codebook.snap`), scales that every target holds.
"""

import torch
from torch import Tensor

from edgekit.quantize.codebook.kmeans import kmeans
from edgekit.quantize.codebook.snap import snap
from edgekit.quantize.scales import SCALES, SMALLEST_SCALE
from edgekit.quantize.tensor import QuantizedTensor

_ROUNDS = 4
# How far scales are moved in the search for better ones, and how many short groups try.
_FACTORS = (0.8, 0.9, 1.1, 1.2)
_SHORT = 256


def fit_codebook(
    weight: Tensor,
    bits: int,
    books: int = 1,
    *,
    group_size: int | None = None,
    importance: Tensor | None = None,
    table: tuple[int, ...] | None = None,
) -> QuantizedTensor:
    """Return indices of `bits` bits for a float weight `[rows, columns]`, with their codebooks.

    Each of `books` equal runs of rows has its own; a scale is for a row, or for `group_size`
    columns of it. `importance`, `[columns]` or the weight's shape, weighs squared errors. `table`
    is a codebook to use as it is instead. Raises ValueError for shapes that do not fit and for
    values that are infinite, NaN or too large to store.
    """
    rows, columns = _check(weight, books, group_size)
    size = group_size or columns
    values = weight.detach().to(torch.float32).reshape(books, -1, size)
    weights = None
    if importance is not None:
        spread = importance.detach().to(torch.float32).expand(rows, columns)
        weights = spread.reshape(books, -1, size)
    parts = [
        _fit(part, None if weights is None else weights[index], bits, table)
        for index, part in enumerate(values)
    ]
    codebook = torch.stack([part[0] for part in parts])
    scales = torch.cat([part[1] for part in parts])
    return QuantizedTensor(
        codes=torch.cat([part[2] for part in parts]).reshape(rows, columns),
        scales=scales if group_size is None else scales.reshape(rows, -1),
        bits=bits,
        group_size=group_size,
        axis=0 if group_size is None else None,
        codebook=codebook[0] if books == 1 else codebook,
    )


def nearest(values: Tensor, book: Tensor) -> Tensor:
    """Return the index of the nearest of ascending entries `[levels]`, int32."""
    return torch.bucketize(values, (book[1:] + book[:-1]) / 2, out_int32=True)


def best_scales(values: Tensor, entries: Tensor, weights: Tensor | None) -> Tensor:
    """Return the scale of each unit `[units, size]` that brings its entries nearest to the values.

    `sum h x c / sum h c^2`, not below what can be stored.
    """
    products, squares = values * entries, entries.square()
    if weights is not None:
        products, squares = products * weights, squares * weights
    found = products.sum(-1) / squares.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return found.clamp(min=SMALLEST_SCALE)


def _check(weight: Tensor, books: int, group_size: int | None) -> tuple[int, int]:
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"codebooks are for matrices, got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    if rows % books:
        raise ValueError(f"{books} codebooks do not divide {rows} rows")
    if columns % (group_size or 1):
        raise ValueError(f"group size {group_size} does not divide {columns} columns")
    if not bool(weight.isfinite().all()):
        raise ValueError("the weight holds infinities or NaN")
    return rows, columns


def _fit(
    values: Tensor, weights: Tensor | None, bits: int, table: tuple[int, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return integer entries, storable scales `[units]` and indices of units `[units, size]`."""
    scales = values.square().mean(-1).sqrt().clamp(min=SMALLEST_SCALE)
    if table is None:
        book = _book(values, scales, weights, bits)
    else:
        book = torch.tensor(table, dtype=torch.float32)
        scales = values.abs().amax(-1).clamp(min=SMALLEST_SCALE) / book.abs().max()
    for _ in range(_ROUNDS):
        scales = _better_scales(values, scales, weights, book)
        if table is None:
            book = _moved(values, scales, weights, book)
    if table is None:
        entries, factors = snap(book[None], scales[None])
        book, scales = entries[0], scales * factors[0]
    scales = SCALES.round(scales)
    return book, scales, nearest(values / scales[:, None], book).to(torch.uint8)


def _book(values: Tensor, scales: Tensor, weights: Tensor | None, bits: int) -> Tensor:
    heavier = scales.square()[:, None]
    mass = heavier.expand_as(values) if weights is None else weights * heavier
    return kmeans(values / scales[:, None], mass, 1 << bits)


def _moved(values: Tensor, scales: Tensor, weights: Tensor | None, book: Tensor) -> Tensor:
    """Return each entry as the weighted mean of the values that are nearest to it."""
    scaled = values / scales[:, None]
    mass = scales.square()[:, None] * (torch.ones_like(values) if weights is None else weights)
    index = nearest(scaled, book).reshape(-1).long()
    total, count = (
        torch.bincount(index, part.reshape(-1).double(), len(book))
        for part in (scaled * mass, mass)
    )
    moved = torch.where(count > 0, total / count.clamp(min=1e-300), book.double())
    return moved.to(torch.float32)


def _better_scales(values: Tensor, scales: Tensor, weights: Tensor | None, book: Tensor) -> Tensor:
    """Refit the scales to their indices; a short group also tries some that are near."""
    best, error = scales, _errors(values, scales, weights, book)
    entries = book[nearest(values / scales[:, None], book)]
    candidates = [best_scales(values, entries, weights)]
    if values.shape[-1] <= _SHORT:
        candidates += [scales * factor for factor in _FACTORS]
    for candidate in candidates:
        candidate = candidate.clamp(min=SMALLEST_SCALE)
        found = _errors(values, candidate, weights, book)
        best = torch.where(found < error, candidate, best)
        error = torch.minimum(found, error)
    return best


def _errors(values: Tensor, scales: Tensor, weights: Tensor | None, book: Tensor) -> Tensor:
    """Return each unit's weighted squared error with the indices that are nearest."""
    scaled = values / scales[:, None]
    errors = (scaled - book[nearest(scaled, book)]).square_()
    if weights is not None:
        errors *= weights
    return errors.sum(-1) * scales.square()
