"""Quantizing a model by its resolved table, one tensor in memory at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.tensor import QuantizedTensor, Weight, as_rows


@dataclass(frozen=True, eq=False)
class Applied:
    """One tensor after quantization.

    value    its codes, or the float tensor as stored where the scheme is float
    weight   the float weight it came from; None where `same_as` is set
    same_as  the tensor under whose name the same `value` came before, if any
    """

    row: Resolved
    value: Weight
    weight: Tensor | None
    same_as: str | None = None


def quantize_tensors(
    table: Table, get_tensor: Callable[[str], Tensor]
) -> Iterator[tuple[str, Weight]]:
    """Yield each tensor's name with its codes, or with the tensor as stored where it is float.

    `get_tensor` is called once per row with the tensor's name, or, for one that is tied, with
    that of the tensor whose values it has; where both rows have the same scheme and range the
    same object is yielded for both and quantized once. Raises EdgekitError naming the tensor.
    """
    for applied in apply(table, get_tensor):
        yield applied.row.tensor, applied.value


def apply(table: Table, get_tensor: Callable[[str], Tensor]) -> Iterator[Applied]:
    """Yield what `quantize_tensors` does, together with each row and float weight."""
    shared = table.shared
    # Only codes that a later name will ask for outlive their turn; their weight does not.
    kept: dict[str, tuple[str, Weight]] = {}
    for row in table:
        source = table.tied.get(row.tensor, row.tensor)
        is_shared = row.tensor in shared or row.tensor in shared.values()
        if is_shared and source in kept:
            first, value = kept[source]
            yield Applied(row, value, None, same_as=first)
            continue
        weight = get_tensor(source)
        value = _quantize(row, weight)
        if is_shared:
            kept[source] = row.tensor, value
        yield Applied(row, value, weight)
        del weight, value  # before the next tensor is read


def sqnr_db(weight: Tensor, quantized: QuantizedTensor) -> float:
    """Return the signal to quantization noise ratio in dB: 10 log10(sum w^2 / sum (w - w^)^2).

    Infinite where the codes are exact.
    """
    rows = as_rows(weight.detach())
    signal = noise = 0.0
    for part, restored in quantized.decoded():
        exact = rows[part].to(torch.float32)
        signal += float(exact.square().sum())
        noise += float((exact - restored).square_().sum())
    return ratio_db(signal, noise)


def ratio_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): infinite without noise, else -infinite without a signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _quantize(row: Resolved, weight: Tensor) -> Weight:
    if tuple(weight.shape) != row.shape:
        raise EdgekitError(f"{row.tensor}: expected shape {row.shape}, got {tuple(weight.shape)}")
    if row.scheme.is_float:
        return weight
    try:
        return quantize_weight(row.scheme, weight, row.range)
    except ValueError as error:
        raise EdgekitError(
            f"{row.tensor}: cannot be quantized to {row.scheme.name}: {error}"
        ) from error
