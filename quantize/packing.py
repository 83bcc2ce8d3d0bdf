"""Bit packing of integer codes along the last axis.

Layout: each row (all axes but the last) is a little-endian bit stream of its own. Value i of a
row occupies bits `i*bits ... i*bits + bits - 1`, bit 0 being the lowest bit of the first byte:
at 4 bits the even values are low nibbles, at 2 bits a byte holds four values, at 3 and 5 bits eight
values fill three and five bytes, at 6 bits four fill three. Negative codes are stored as the low
bits of their two's complement; the last byte of a row is filled up with zero bits. 8-bit codes are
stored as they are.
"""

import torch
from torch import Tensor

from edgekit.quantize.schemes.sizes import PACKABLE_BITS, packed_size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 or uint8 codes [..., columns] into uint8 [..., ceil(columns * bits / 8)].

    Raises ValueError for other types, for bits outside `PACKABLE_BITS`, and for scalars. Codes must
    fit their bits: `QuantizedTensor` guarantees it, nothing is checked again here.
    """
    _check(codes, bits)
    values = codes.view(torch.uint8)
    if bits == 8:
        return values.clone()
    columns = codes.shape[-1]
    per_unit, unit_bytes = _unit(bits)
    padding = -columns % per_unit
    units = torch.nn.functional.pad(values & ((1 << bits) - 1), (0, padding))
    units = units.reshape(*codes.shape[:-1], -1, per_unit)
    packed = torch.zeros(*units.shape[:-1], unit_bytes, dtype=torch.uint8)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= units[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= units[..., index] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_size(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int, signed: bool) -> Tensor:
    """Undo `pack`: uint8 [..., bytes] to codes [..., columns], int8 where signed, else uint8.

    Raises ValueError where the bytes of a row are not those of `columns` codes.
    """
    _check(packed, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_size(columns, bits):
        raise ValueError(
            f"packed rows must be {packed_size(columns, bits)} bytes of uint8 for {columns} codes "
            f"of {bits} bits, got {packed.shape[-1]} of {packed.dtype}"
        )
    dtype = torch.int8 if signed else torch.uint8
    if bits == 8:
        return packed.clone().view(dtype)
    per_unit, unit_bytes = _unit(bits)
    units = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % unit_bytes))
    units = units.reshape(*packed.shape[:-1], -1, unit_bytes)
    values = torch.empty(*units.shape[:-1], per_unit, dtype=torch.uint8)
    for index in range(per_unit):
        byte, shift = divmod(index * bits, 8)
        value = units[..., byte] >> shift
        if shift + bits > 8:
            value = value | (units[..., byte + 1] << (8 - shift))
        values[..., index] = value & ((1 << bits) - 1)
    codes = values.flatten(-2)[..., :columns].contiguous()
    if not signed:
        return codes
    sign = 1 << (bits - 1)
    return (codes ^ sign).view(torch.int8) - sign


def _unit(bits: int) -> tuple[int, int]:
    """Return the smallest whole number of bytes that holds whole values: (values, bytes)."""
    return {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3)}[bits]


def _check(codes: Tensor, bits: int) -> None:
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {bits}")
    if codes.dtype not in (torch.int8, torch.uint8) or codes.ndim == 0:
        raise ValueError(
            f"codes must be int8 or uint8 of at least one axis, got {codes.dtype} {codes.ndim}-D"
        )
