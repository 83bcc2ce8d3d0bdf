"""Weights as ggml's blocks: the codes and scales of a `QuantizedTensor`, verbatim.

Layouts (ggml/src/ggml-common.h), d and m in float16, all but the last of 32 weights:

    Q8_0   d, then 32 int8                                 weight = d * q
    Q4_0   d, then byte j holds q of weight j and j + 16   weight = d * (q - 8)
    Q4_1   d, m, then as in Q4_0                           weight = d * q + m
    Q5_0   d, the fifth bits of all q, then as in Q4_0     weight = d * (q - 16)
    IQ4_NL d, then as in Q4_0                              weight = d * table[q]
    Q6_K   of 256: the low 4 bits of all q, the upper 2,   weight = d * s * (q - 32)
           an int8 s for each 16 weights, d

A scale of a channel or of a longer group is repeated in each of its blocks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.block_types import BLOCK, SUPER_BLOCK
from edgekit.quantize import super_blocks
from edgekit.quantize.schemes.codebook import IQ4_NL
from edgekit.quantize.schemes.super_blocks import GROUPS
from edgekit.quantize.tensor import QuantizedTensor, as_rows

CHUNK_WEIGHTS = 1 << 22
"""Weights packed at once: some MB of working copies, whatever the tensor's size."""

FLOAT_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Bytes = NDArray[np.uint8]


def float_pieces(name: str, tensor: Tensor, kind: str) -> Iterator[Bytes]:
    """Yield a float tensor's bytes as type `kind`; EdgekitError where that would round a value."""
    stored = next(dtype for dtype, known in FLOAT_TYPES.items() if known == kind)
    flat = tensor.detach().reshape(-1)
    for part in torch.split(flat, CHUNK_WEIGHTS):
        values = part.to(stored)
        if not torch.equal(values.to(part.dtype), part):
            raise EdgekitError(f"{name}: {part.dtype} values do not fit {kind}")
        yield values.contiguous().view(torch.uint8).numpy()


def block_pieces(name: str, tensor: QuantizedTensor) -> Iterator[Bytes]:
    """Yield the blocks of a quantized tensor, some rows at a time.

    EdgekitError where a scale or a minimum would be rounded, for then the file would hold another
    weight than everything else does.
    """
    table = tensor.codebook
    if table is not None and table.tolist() != list(IQ4_NL):
        raise EdgekitError(f"{name}: ggml has no blocks for codebooks but its own, IQ4_NL")
    if tensor.two_levels:
        yield from _super_block_pieces(tensor)
        return
    codes, columns = as_rows(tensor.codes), tensor.shape[-1]
    blocks = columns // BLOCK
    scales = _per_block(tensor.scales, tensor, blocks)
    zeros = None if tensor.zero_points is None else _per_block(tensor.zero_points, tensor, blocks)
    step = max(1, CHUNK_WEIGHTS // columns)
    for begin in range(0, len(codes), step):
        rows = slice(begin, begin + step)
        part = codes[rows].numpy().reshape(-1, blocks, BLOCK)
        scale = _exact_half(name, scales[rows])
        if tensor.bits == 8:
            packed = _q8_0(part, scale)
        elif table is not None:
            packed = _nibbles(part, scale)
        elif tensor.bits == 5:
            packed = _q5_0(part, scale)
        elif zeros is None:
            packed = _q4_0(part, scale)
        else:
            packed = _q4_1(part, scale, _exact_half(name, -(zeros[rows] * scales[rows])))
        yield packed.view(np.uint8).reshape(-1)


def _super_block_pieces(tensor: QuantizedTensor) -> Iterator[Bytes]:
    codes = as_rows(tensor.codes)
    blocks = tensor.shape[-1] // SUPER_BLOCK
    steps, multiples = super_blocks.split(as_rows(tensor.scales))
    step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
    for begin in range(0, len(codes), step):
        rows = slice(begin, begin + step)
        packed = _q6_k(
            codes[rows].numpy().reshape(-1, blocks, SUPER_BLOCK),
            multiples[rows].numpy().reshape(-1, blocks, GROUPS),
            steps[rows].numpy(),
        )
        yield packed.view(np.uint8).reshape(-1)


def _per_block(values: Tensor, tensor: QuantizedTensor, blocks: int) -> NDArray[np.float32]:
    """Spread scales or zero points to `[rows, blocks]`, as a view where they repeat."""
    rows = as_rows(tensor.codes).shape[0]
    if tensor.group_size is not None:
        spread = as_rows(values).repeat_interleave(tensor.group_size // BLOCK, dim=-1)
    else:
        spread = values.reshape(-1, 1).expand(rows, blocks)
    result: NDArray[np.float32] = spread.to(torch.float32).numpy()
    return result


def _exact_half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), values):
        bad = values[half.astype(np.float32) != values].flat[0]
        raise EdgekitError(f"{name}: the scale or minimum {bad:.9g} is not exact in float16")
    return half


def _q8_0(codes: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[np.void]:
    out = np.empty(codes.shape[:2], np.dtype([("d", "<f2"), ("q", "i1", BLOCK)]))
    out["d"], out["q"] = scale, codes
    return out


def _q4_0(codes: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[np.void]:
    # As unsigned: the low 4 bits of q, with the sign bit turned over, are q + 8.
    shifted: NDArray[np.uint8] = (codes.view(np.uint8) & np.uint8(15)) ^ np.uint8(8)
    return _nibbles(shifted, scale)


def _nibbles(codes: NDArray[np.uint8], scale: NDArray[np.float16]) -> NDArray[np.void]:
    out = np.empty(codes.shape[:2], np.dtype([("d", "<f2"), ("q", "u1", BLOCK // 2)]))
    out["d"] = scale
    _pair_nibbles(codes, out["q"])
    return out


def _q5_0(codes: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[np.void]:
    kind = np.dtype([("d", "<f2"), ("h", "u1", BLOCK // 8), ("q", "u1", BLOCK // 2)])
    out = np.empty(codes.shape[:2], kind)
    shifted = (codes + 16).view(np.uint8)
    out["d"], out["h"] = scale, np.packbits(shifted >> 4, axis=-1, bitorder="little")
    _pair_nibbles(shifted & np.uint8(15), out["q"])
    return out


def _q6_k(
    codes: NDArray[np.int8], multiples: NDArray[np.uint8], step: NDArray[np.float16]
) -> NDArray[np.void]:
    """Pack super-blocks `[rows, blocks, 256]`: each half is four runs of 32 weights."""
    low, high = SUPER_BLOCK // 2, SUPER_BLOCK // 4
    kind = np.dtype([("l", "u1", low), ("h", "u1", high), ("s", "i1", 16), ("d", "<f2")])
    out = np.empty(codes.shape[:2], kind)
    runs = (codes + 32).view(np.uint8).reshape(*codes.shape[:2], 2, 4, 32)
    nibbles, upper = runs & np.uint8(15), runs >> 4
    # Of a half, the first 32 bytes hold runs 0 and 2, the other 32 runs 1 and 3.
    out["l"] = (nibbles[..., :2, :] | nibbles[..., 2:, :] << 4).reshape(*codes.shape[:2], low)
    pairs = [upper[..., run, :] << 2 * run for run in range(4)]
    out["h"] = (pairs[0] | pairs[1] | pairs[2] | pairs[3]).reshape(*codes.shape[:2], high)
    out["s"], out["d"] = multiples, step
    return out


def _q4_1(
    codes: NDArray[np.uint8], scale: NDArray[np.float16], minimum: NDArray[np.float16]
) -> NDArray[np.void]:
    kind = np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)])
    out = np.empty(codes.shape[:2], kind)
    out["d"], out["m"] = scale, minimum
    _pair_nibbles(codes, out["q"])
    return out


def _pair_nibbles(codes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    np.left_shift(codes[..., BLOCK // 2 :], 4, out=out)
    np.bitwise_or(out, codes[..., : BLOCK // 2], out=out)
