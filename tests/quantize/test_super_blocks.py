"""Scales of two levels: exact products, and as good as those of ggml's own quantizer."""

import pytest
import torch
from gguf import GGMLQuantizationType
from support import ggml
from torch import Tensor

from edgekit.quantize import super_blocks
from edgekit.quantize.apply import sqnr_db
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

SIX = parse_scheme("w6g16")


def weight_of(rows: int = 32, columns: int = 512, degrees: float = 1e6) -> Tensor:
    """Weights as of a trained layer; few degrees of freedom give heavy tails."""
    torch.manual_seed(0)
    return torch.distributions.StudentT(degrees).sample((rows, columns)) / 50


def test_scales_are_products_that_come_apart_again() -> None:
    scales = quantize_weight(SIX, weight_of()).scales
    steps, multiples = super_blocks.split(scales)
    assert (steps.dtype, steps.shape) == (torch.float16, (32, 2))
    assert (multiples.dtype, multiples.shape) == (torch.uint8, scales.shape)
    assert int(multiples.min()) >= 1
    assert (multiples.view(32, 2, 16).amax(2) == 127).all()
    assert torch.equal(super_blocks.join(steps, multiples), scales)
    by_hand = steps.double().repeat_interleave(16, 1) * multiples.double()
    assert torch.equal(by_hand, scales.double())


@pytest.mark.parametrize("damage", ["largest", "between", "float16", "zero"])
def test_other_scales_are_refused(damage: str) -> None:
    scales = 2.0**-10 * torch.arange(112, 128).float()[None]
    codes = torch.ones(1, 256, dtype=torch.int8)
    QuantizedTensor(codes, scales, bits=6, group_size=16)
    if damage == "largest":
        scales[0, -1] /= 2
    elif damage == "between":
        scales[0, 3] *= 1.001
    elif damage == "float16":
        scales *= 1 + 2.0**-12
    else:
        scales[0, 0] = 2.0**-12
    with pytest.raises(ValueError, match="6-bit scales must be 1 to 127 times a float16"):
        QuantizedTensor(codes, scales, bits=6, group_size=16)


def test_minimum_and_maximum_clip_by_no_more_than_rounding_costs() -> None:
    weight = weight_of(degrees=3)
    tensor = quantize_weight(SIX, weight, "minmax")
    steps = (weight - tensor.dequantize()).abs() / tensor.scales.repeat_interleave(16, 1)
    # A step is rounded by 2**-11 of it or, where it is subnormal, by half of 2**-24.
    assert float(steps.max()) < 0.6


@pytest.mark.parametrize("degrees", [1e6, 4.0])
@pytest.mark.parametrize(("name", "kind"), [("w5g32", "Q5_0"), ("w6g16", "Q6_K")])
def test_they_lose_what_ggmls_own_quantizer_loses(name: str, kind: str, degrees: float) -> None:
    """ggml may turn a scale's sign over, which is worth 0.05 dB of a Gaussian."""
    weight = weight_of(degrees=degrees)
    of_kind = GGMLQuantizationType[kind]
    theirs = torch.from_numpy(ggml.dequantize(ggml.quantize(weight.numpy(), of_kind), of_kind))
    noise = (weight - theirs.view(weight.shape)).square().sum()
    found = {
        method: sqnr_db(weight, quantize_weight(parse_scheme(name), weight, method))
        for method in ("minmax", "mse")
    }
    assert found["mse"] > float(10 * torch.log10(weight.square().sum() / noise)) - 0.1
    assert found["mse"] > found["minmax"]


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_odd_inputs(method: RangeMethod) -> None:
    weight = weight_of(6, 256)
    weight[0] = 0
    weight[1, :16] = 0
    weight[2] *= 1e-9
    weight[3, 16:] *= 1e-6
    weight[4] *= 1e6
    tensor = quantize_weight(SIX, weight, method)
    restored = tensor.dequantize()
    assert not restored[0].any()
    assert not restored[1, :16].any()
    assert not restored[2].any()
    assert float((restored[4] - weight[4]).abs().max() / weight[4].abs().max()) < 0.05
    with pytest.raises(ValueError, match="largest that can be stored"):
        quantize_weight(SIX, torch.full((1, 256), 1e38), method)


def test_rows_of_parts_of_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="its blocks are of 256 columns, which do not divide 128"):
        SIX.check_shape((4, 128))
    with pytest.raises(ValueError, match="come in runs of 16"):
        quantize_weight(SIX, weight_of(1, 128))
