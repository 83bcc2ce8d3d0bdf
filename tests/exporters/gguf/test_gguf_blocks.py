"""ggml's blocks hold a quantized tensor bit for bit, as gguf-py dequantizes them."""

import gguf as peer
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import ggml

from edgekit.errors import EdgekitError
from edgekit.exporters.gguf import blocks as gguf_blocks
from edgekit.exporters.gguf.block_types import block_type
from edgekit.exporters.gguf.blocks import block_pieces, float_pieces
from edgekit.exporters.gguf.decoder import fake_quantize
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

SCHEMES = ["w8", "w8g32", "w8g128", "w4", "w4g32", "w4g64", "w4g128", "w4g32a", "w4g128a"]
SCHEMES += ["w5g32", "w6g16"]


def blocks_of(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """Return the blocks as rows of bytes."""
    return np.concatenate(list(block_pieces("some.weight", tensor))).reshape(tensor.shape[0], -1)


def read_back(tensor: QuantizedTensor, kind: str) -> torch.Tensor:
    values = peer.quants.dequantize(blocks_of(tensor), peer.GGMLQuantizationType[kind])
    return torch.from_numpy(values)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk", [1 << 22, 300])
def test_what_gguf_py_dequantizes_is_the_tensor(
    scheme: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a chunk is a single row."""
    monkeypatch.setattr(gguf_blocks, "CHUNK_WEIGHTS", chunk)
    weight = torch.randn(37, 256, generator=torch.Generator().manual_seed(0))
    weight[3], weight[4], weight[5] = 0, weight[4].abs(), -weight[5].abs() * 1e-3
    weight[6] *= 1e3
    tensor = quantize_weight(parse_scheme(scheme), weight)
    kind = block_type(parse_scheme(scheme))
    assert torch.equal(bits(read_back(tensor, kind)), bits(tensor.dequantize()))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_every_code_and_zero_point_comes_back(kind: str) -> None:
    count = 256 if kind == "Q8_0" else 16
    codes = torch.arange(count).repeat(16, 2)  # a row for each zero point
    signed = kind != "Q4_1"
    zeros = (
        None if signed else torch.arange(16, dtype=torch.int32).repeat_interleave(2 * count // 32)
    )
    tensor = QuantizedTensor(
        (codes - count // 2).to(torch.int8) if signed else codes.to(torch.uint8),
        torch.full((16, 2 * count // 32), 127 / 64),
        None if zeros is None else zeros.view(16, -1),
        bits=8 if kind == "Q8_0" else 4,
        group_size=32,
    )
    assert torch.equal(bits(read_back(tensor, kind)), bits(tensor.dequantize()))


def test_every_code_of_five_bits_comes_back() -> None:
    codes = torch.arange(-16, 16).to(torch.int8).repeat(2, 3)
    codes[1] = codes[1].flip(0)
    tensor = QuantizedTensor(codes, torch.full((2, 3), 127 / 64), bits=5, group_size=32)
    assert torch.equal(bits(read_back(tensor, "Q5_0")), bits(tensor.dequantize()))


@pytest.mark.parametrize("step", [2.0**-24, 3 * 2.0**-24, 2047 * 2.0**-12, 65504.0])
def test_every_code_and_multiple_of_six_bits_comes_back(step: float) -> None:
    """Steps from the least subnormal float16 to the largest; each multiple meets each code."""
    multiples = torch.arange(1, 128).repeat_interleave(4)
    multiples = torch.cat([multiples.view(-1, 4), torch.full((127, 12), 127)], 1)
    codes = torch.arange(-32, 32).to(torch.int8).repeat(127, 4)
    codes[::2] = codes[::2].flip(1)
    tensor = QuantizedTensor(codes, multiples * step, bits=6, group_size=16)
    assert torch.equal(bits(read_back(tensor, "Q6_K")), bits(tensor.dequantize()))
    exact = codes.double() * (multiples.double() * step).repeat_interleave(16, 1)
    assert torch.equal(tensor.dequantize().double(), exact)


@pytest.mark.parametrize(("scheme", "kind"), [("w5g32", "Q5_0"), ("w6g16", "Q6_K")])
def test_the_engine_reads_what_gguf_py_reads(scheme: str, kind: str) -> None:
    tensor = quantize_weight(
        parse_scheme(scheme), torch.randn(9, 512, generator=torch.Generator().manual_seed(3)) / 50
    )
    blocks = blocks_of(tensor)
    assert blocks.nbytes == tensor.nbytes
    values = ggml.dequantize(blocks.tobytes(), peer.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(values).view(9, 512), tensor.dequantize())


def test_six_bits_round_their_inputs_as_ggml_does() -> None:
    """Q6_K is multiplied by `block_q8_K`, a scale of float32 for 256 inputs."""
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(4))
    x[2, 256:] = 0
    weight = quantize_weight(parse_scheme("w6g16"), torch.ones(1, 512))
    expected = torch.from_numpy(ggml.round_to_q8_k(x.numpy()))
    found = fake_quantize(x, weight)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(
        found, fake_quantize(x, quantize_weight(parse_scheme("w5g32"), x)), rtol=1e-6
    )


def test_blocks_are_those_of_gguf_py_for_its_own_scales() -> None:
    """Where the scales are the largest value over 127, the bytes are what ggml itself makes."""
    weight = torch.randint(-127, 128, (8, 64), generator=torch.Generator().manual_seed(1)).float()
    weight[:, ::32] = 127
    tensor = QuantizedTensor(weight.to(torch.int8), torch.ones(8, 2), bits=8, group_size=32)
    expected = peer.quants.quantize(weight.numpy(), peer.GGMLQuantizationType.Q8_0)
    assert np.array_equal(blocks_of(tensor), expected)


@pytest.mark.parametrize("scale", [0.1, 1e-8, 70000.0])
def test_a_scale_that_float16_would_round_is_refused(scale: float) -> None:
    tensor = QuantizedTensor(
        torch.ones(2, 64, dtype=torch.int8), torch.tensor([1.0, scale]), bits=8, axis=0
    )
    with pytest.raises(EdgekitError, match=r"some.weight: the scale or minimum .* not exact"):
        blocks_of(tensor)


def test_a_minimum_that_float16_would_round_is_refused() -> None:
    tensor = QuantizedTensor(
        torch.ones(1, 32, dtype=torch.uint8),
        torch.tensor([[255 / 128]]),
        torch.tensor([[15]], dtype=torch.int32),
        bits=4,
        group_size=32,
    )
    with pytest.raises(EdgekitError, match=r"minimum -29\.88.* is not exact in float16"):
        blocks_of(tensor)


def test_a_codebook_is_refused() -> None:
    tensor = QuantizedTensor(
        torch.zeros(1, 32, dtype=torch.uint8),
        torch.ones(1, 1),
        bits=4,
        group_size=32,
        codebook=torch.arange(16.0),
    )
    with pytest.raises(EdgekitError, match="codebooks"):
        blocks_of(tensor)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.bfloat16, "F32"),
        (torch.float16, "F32"),
    ],
)
def test_floats_are_stored_exactly(dtype: torch.dtype, kind: str) -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    weight[0, :2] = torch.tensor([0.0, -0.0])
    stored = np.concatenate(list(float_pieces("n", weight, kind))).reshape(5, -1)
    values = peer.quants.dequantize(stored, peer.GGMLQuantizationType[kind])
    assert torch.equal(bits(torch.from_numpy(values)), bits(weight.float()))


def test_a_float_that_would_be_rounded_is_refused() -> None:
    with pytest.raises(EdgekitError, match="n: torch.float32 values do not fit F16"):
        list(float_pieces("n", torch.tensor([0.1]), "F16"))


def test_floats_have_no_blocks() -> None:
    with pytest.raises(ValueError, match="no codes"):
        block_type(FLOAT)
