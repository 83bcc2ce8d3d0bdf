"""Coordinate descent on a layer's output error: indices, scales and codebook, each exactly.

Not of JLCM's paper: a gradient that passes straight through a choice moves many weights at once,
which together overshoot. Here one column after the other takes, in each row, the best entry among
the present one and its neighbours for all other columns as they are (as QuantEase, arXiv
2309.01885, over a whole grid); then each scale and all entries take their least squares. No step
raises the error but the rounding of entries and scales to what is stored, which is done before the
last round of indices.
"""

from dataclasses import replace

import torch
from torch import Tensor

from edgekit.quantize.codebook.fit import nearest
from edgekit.quantize.codebook.output import OutputError
from edgekit.quantize.codebook.snap import snap
from edgekit.quantize.scales import SCALES, SMALLEST_SCALE
from edgekit.quantize.tensor import QuantizedTensor, as_rows

_BLOCK = 128
"""Columns whose changes reach the rest of the matrix in one product, as in GPTQ."""


def settle(
    tensor: QuantizedTensor, error: OutputError, rounds: int, fixed: bool = False
) -> QuantizedTensor:
    """Return indices, scales and codebooks after so many rounds of descent, as they are stored.

    With `fixed` codebooks, of integers as stored, stay as they are.
    """
    assert tensor.codebook is not None
    books = as_rows(tensor.codebook)
    run = tensor.shape[0] // len(books)
    parts = [
        _settle(
            tensor.rows(slice(index * run, (index + 1) * run)),
            book,
            OutputError(error.hessian, error.wanted[index * run : (index + 1) * run]),
            rounds,
            fixed,
        )
        for index, book in enumerate(books)
    ]
    return replace(
        tensor,
        codes=torch.cat([part[0] for part in parts]),
        scales=torch.cat([part[1] for part in parts]).reshape(tensor.scales.shape),
        codebook=torch.stack([part[2] for part in parts]).reshape(tensor.codebook.shape),
    )


def _settle(
    tensor: QuantizedTensor, book: Tensor, error: OutputError, rounds: int, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, storable scales `[rows, groups]`, integer entries of a codebook's rows."""
    rows = tensor.shape[0]
    descent = _Descent(tensor.codes.long(), tensor.scales.reshape(rows, -1).clone(), book, error)
    for _ in range(rounds):
        descent.indices()
        descent.scale()
        if not fixed:
            descent.entries()
    descent.store(fixed)
    descent.indices()
    return descent.codes.to(torch.uint8), descent.scales, descent.book


class _Descent:
    """The weight `book[codes] * scales`, and half the error's gradient there."""

    def __init__(self, codes: Tensor, scales: Tensor, book: Tensor, error: OutputError) -> None:
        self.codes, self.scales, self.book, self.error = codes, scales, book, error
        self.size = codes.shape[1] // scales.shape[1]

    def weight(self) -> Tensor:
        return self.book[self.codes] * self.spread()

    def spread(self) -> Tensor:
        return self.scales.repeat_interleave(self.size, 1)

    def indices(self) -> None:
        """Move each weight at most one entry, column after column."""
        weight, spread = self.weight(), self.spread()
        slope, hessian = self.error.gradient(weight), self.error.hessian
        # Columns are strided in row-major order: their copies are what is worked on.
        columns, slopes = weight.t().contiguous(), slope.t().contiguous()
        scales, codes = spread.t().contiguous(), self.codes.t().contiguous()
        for start in range(0, len(hessian), _BLOCK):
            part = slice(start, start + _BLOCK)
            curve, local = hessian[part, part], slopes[part].clone()
            before = columns[part].clone()
            for place in range(len(curve)):
                column = start + place
                best = columns[column] - local[place] / curve[place, place]
                found = nearest(best / scales[column], self.book).long()
                found = torch.minimum(torch.maximum(found, codes[column] - 1), codes[column] + 1)
                value = self.book[found] * scales[column]
                local.addr_(curve[place], value - columns[column])
                columns[column], codes[column] = value, found
            slopes.addmm_(hessian[:, part], columns[part] - before)
        self.codes = codes.t().contiguous()

    def scale(self) -> None:
        """Give each row or group its best scale for the others as they are."""
        slope = self.error.gradient(self.weight())
        for group in range(self.scales.shape[1]):
            part = slice(group * self.size, (group + 1) * self.size)
            entries = self.book[self.codes[:, part]]
            curve = ((entries @ self.error.hessian[part, part]) * entries).sum(1)
            change = -(slope[:, part] * entries).sum(1) / curve.clamp(min=1e-30)
            scale = (self.scales[:, group] + change).clamp(min=SMALLEST_SCALE)
            change = scale - self.scales[:, group]
            self.scales[:, group] = scale
            if self.scales.shape[1] > 1:
                slope += (entries * change[:, None]) @ self.error.hessian[part]

    def entries(self) -> None:
        """Solve for all entries at once: `sum_l <M_k H, M_l> C_l = <M_k, G>`."""
        spread = self.spread()
        levels = len(self.book)
        matrix, right = torch.empty(levels, levels, dtype=torch.float64), []
        for level in range(levels):
            mask = spread * (self.codes == level)
            product = (mask @ self.error.hessian) * spread
            matrix[level] = torch.bincount(self.codes.flatten(), product.flatten().double(), levels)
            right.append((mask * self.error.wanted).sum(dtype=torch.float64))
        # An entry that no weight takes stays where it is.
        slope = torch.stack(right) - matrix @ self.book.double()
        matrix.diagonal().add_(1e-9 * matrix.diagonal().max().clamp(min=1e-30))
        self.book, order = (self.book + torch.linalg.solve(matrix, slope).float()).sort()
        self.codes = order.argsort()[self.codes]

    def store(self, fixed: bool) -> None:
        """Round entries and scales to what is stored."""
        if not fixed:
            entries, factors = snap(self.book[None], self.scales.reshape(1, -1))
            self.book, self.scales = entries[0], self.scales * factors[0]
        self.scales = SCALES.round(self.scales.clamp(min=SMALLEST_SCALE))
