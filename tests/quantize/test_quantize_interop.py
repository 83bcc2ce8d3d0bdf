"""Independent implementations agree: torch, torchao and gguf read our codes as the same numbers."""

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.quantize.affine import quantize
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.grid import Grid
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

GRIDS = [
    Grid(bits, symmetric, restricted)
    for bits in (4, 8)
    for symmetric, restricted in ((True, False), (True, True), (False, False))
]


def weight_of(*shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(11))
    # Rows of very different size, one of them below what float16 holds as normal numbers.
    return values * torch.logspace(-7, 2, shape[0])[:, None]


@pytest.mark.parametrize("grid", GRIDS)
def test_torch_computes_the_same_values(grid: Grid) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    result = quantize(weight, grid, axis=0)
    zeros = torch.zeros(16, dtype=torch.int32) if result.zero_points is None else result.zero_points
    theirs = torch.fake_quantize_per_channel_affine(
        weight, result.scales, zeros, 0, grid.low, grid.high
    )
    # torch multiplies by 1 / scale, so a value half way between two codes may go the other way.
    differ = (theirs - result.dequantize()).abs() / result.scales[:, None]
    assert float(differ.max()) <= 1 + 1e-5
    assert int((differ > 1e-5).sum()) <= 2


def test_torchao_computes_the_same_codes_for_groups() -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    result = quantize(weight, Grid(4), group_size=32, method="mse")
    theirs = primitives.quantize_affine(
        weight, (1, 32), result.scales, torch.zeros(8, 2, dtype=torch.int32), torch.int8, -8, 7
    )
    assert int((theirs != result.codes).sum()) <= 2  # ties, as above
    assert int((theirs - result.codes).abs().max()) <= 1
    restored = primitives.dequantize_affine(
        result.codes, (1, 32), result.scales, None, torch.int8, -8, 7
    )
    assert torch.equal(restored, result.dequantize())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_torch_reads_the_same_numbers(dtype: torch.dtype) -> None:
    weight = weight_of(16, 64)
    result = quantize(weight, Grid(8, symmetric=dtype == torch.qint8), axis=0)
    zeros = torch.zeros(16, dtype=torch.int32) if result.zero_points is None else result.zero_points
    theirs = torch._make_per_channel_quantized_tensor(result.codes, result.scales, zeros, 0)
    assert theirs.dtype == dtype
    assert torch.equal(theirs.dequantize(), result.dequantize())


def fp16_per_block(tensor: QuantizedTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the scale of every block of 32 as the two bytes GGUF stores, [rows, blocks, 2]."""
    rows, columns = tensor.shape
    per_row = tensor.scales.reshape(rows, -1)
    scales = per_row.repeat_interleave(columns // 32 // per_row.shape[1], dim=1)
    return scales.numpy().astype("<f2").view(np.uint8).reshape(rows, -1, 2)


@pytest.mark.parametrize("name", ["w8", "w8g32", "w8g64"])
def test_gguf_reads_eight_bit_codes_as_q8_0(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    tensor = quantize_weight(parse_scheme(name), weight_of(6, 128))
    codes = tensor.codes.numpy().view(np.uint8).reshape(6, -1, 32)
    blocks = np.concatenate([fp16_per_block(tensor), codes], axis=-1).reshape(6, -1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(theirs, tensor.dequantize().numpy())


@pytest.mark.parametrize("name", ["w4", "w4g32", "w4g128"])
def test_gguf_reads_four_bit_codes_as_q4_0(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    tensor = quantize_weight(parse_scheme(name), weight_of(6, 128))
    # Q4_0 stores code + 8, the first half of a block in the low nibbles.
    codes = (tensor.codes.numpy() + 8).view(np.uint8).reshape(6, -1, 32)
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    blocks = np.concatenate([fp16_per_block(tensor), nibbles], axis=-1).reshape(6, -1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(theirs, tensor.dequantize().numpy())
