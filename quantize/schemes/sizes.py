"""Shapes and bytes of what a weight is stored as: packed codes and their scales."""

import math
from typing import Literal

from edgekit.quantize.schemes import super_blocks

Granularity = Literal["tensor", "channel", "group"]

PACKABLE_BITS = (2, 3, 4, 5, 6, 8)


def packed_size(columns: int, bits: int) -> int:
    """Return the bytes of one packed row of `columns` codes."""
    return (columns * bits + 7) // 8


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the lowest and highest code of `bits` bits."""
    low = -(1 << (bits - 1)) if signed else 0
    return low, low + (1 << bits) - 1


def scales_shape(
    shape: tuple[int, ...], axis: int | None, group_size: int | None
) -> tuple[int, ...]:
    """Return the shape of the scales of a weight; ValueError where the weight cannot have them."""
    if axis is not None and group_size is not None:
        raise ValueError(f"axis {axis} and group_size {group_size} exclude each other")
    if axis is not None:
        if not 0 <= axis < len(shape):
            raise ValueError(f"axis must be 0 to {len(shape) - 1} for shape {shape}, got {axis}")
        return (shape[axis],)
    if group_size is None:
        return ()
    if group_size < 1 or not shape or shape[-1] % group_size:
        raise ValueError(f"group size {group_size} does not divide the last axis of shape {shape}")
    return (*shape[:-1], shape[-1] // group_size)


def stored_bytes(
    shape: tuple[int, ...], bits: int, granularity: Granularity, scale_count: int
) -> int:
    """Return the bytes of packed codes and scales (2 bytes a scale per group, else 4).

    Those of 6-bit codes have two levels (`super_blocks`).
    """
    columns = shape[-1] if shape else 1
    packed = math.prod(shape[:-1]) * packed_size(columns, bits)
    if bits == super_blocks.BITS:
        return packed + super_blocks.nbytes(scale_count)
    return packed + scale_count * (2 if granularity == "group" else 4)
