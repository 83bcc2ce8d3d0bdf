"""Weights as ggml's blocks: the codes and scales of a `QuantizedTensor`, verbatim.

Layouts (ggml/src/ggml-common.h), each of 32 weights, d and m in float16:

    Q8_0   d, then 32 int8                                 weight = d * q
    Q4_0   d, then byte j holds q of weight j and j + 16   weight = d * (q - 8)
    Q4_1   d, m, then as in Q4_0                           weight = d * q + m

A scale of a channel or of a longer group is repeated in each of its blocks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.tensor import QuantizedTensor, as_rows

BLOCK = 32
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
CHUNK_WEIGHTS = 1 << 22
"""Weights packed at once: some MB of working copies, whatever the tensor's size."""

FLOAT_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

Bytes = NDArray[np.uint8]


def block_type(scheme: Scheme) -> str:
    """Return ggml's name of the type that holds a scheme's codes; ValueError for float."""
    if scheme.bits is None:
        raise ValueError("the float scheme has no codes")
    if scheme.bits == 8:
        return "Q8_0"
    return "Q4_0" if scheme.symmetric else "Q4_1"


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
    if tensor.codebook is not None:
        raise EdgekitError(f"{name}: ggml has no blocks for codebooks")
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
        elif zeros is None:
            packed = _q4_0(part, scale)
        else:
            packed = _q4_1(part, scale, _exact_half(name, -(zeros[rows] * scales[rows])))
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
    out = np.empty(codes.shape[:2], np.dtype([("d", "<f2"), ("q", "u1", BLOCK // 2)]))
    out["d"] = scale
    # As unsigned: the low 4 bits of q, with the sign bit turned over, are q + 8.
    shifted: NDArray[np.uint8] = (codes.view(np.uint8) & np.uint8(15)) ^ np.uint8(8)
    _pair_nibbles(shifted, out["q"])
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
