"""Schemes: names, grids, sizes, and what quantizing by them costs."""

import math
from collections.abc import Callable

import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.quantize.apply import sqnr_db
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.schemes.affine import Affine
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

NAMES = ["w8", "w8g32", "w4", "w4g32", "w4g64", "w4g128", "w4g96", "w4g32a", "w4g64a"]
NAMES += ["w5g32", "w6g16", "w8g16"]


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*NAMES, "float"])
def test_names_are_read_back(name: str) -> None:
    assert parse_scheme(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w",
        "w5",
        "w6",
        "w5g64",
        "w6g32",
        "w5g32a",
        "w16",
        "W8",
        "w8 ",
        "w4g",
        "w4g0",
        "w4g16",
        "w4g33",
        "w4g-32",
        "w4g032",
        "int8",
    ]
    + ["w8a", "w8a4", "w4g99999999", "float32", "w٤", "w4a", "w8g32a", "w4g32A", "w4g32aa"],
)
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(EdgekitError) as refusal:
        parse_scheme(name)
    assert f"unknown scheme {name!r}" in str(refusal.value)
    assert "float, w8, w4, w8gN, w4gN, w4gNa" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["w8a8", "w4a8-tensor-affine"])
def test_static_activations_are_for_modules(name: str) -> None:
    with pytest.raises(EdgekitError, match=rf"^scheme {name} has static ranges.* give it w8 or"):
        parse_scheme(name)


@pytest.mark.parametrize("name", NAMES)
def test_nbytes_is_that_of_the_quantized_tensor(name: str) -> None:
    scheme = parse_scheme(name)
    for shape in ((3, 768), (1, 1536)):
        assert quantize_weight(scheme, weight_of(*shape)).nbytes == scheme.nbytes(shape)


def test_nbytes_by_hand() -> None:
    assert parse_scheme("w8").nbytes((10, 64)) == 640 + 40
    assert parse_scheme("w4").nbytes((10, 64)) == 320 + 40
    assert parse_scheme("w4g32").nbytes((10, 64)) == 320 + 40
    assert parse_scheme("w4g64").nbytes((10, 64)) == 320 + 20
    assert parse_scheme("w4g64a").nbytes((10, 64)) == 320 + 20 + 10
    assert parse_scheme("w5g32").nbytes((10, 64)) == 400 + 40
    assert parse_scheme("w6g16").nbytes((10, 512)) == 10 * 2 * 210  # as ggml's block_q6_K
    assert FLOAT.nbytes((10, 1, 3)) == 120


def test_quantized_layout() -> None:
    weight = weight_of(4, 64)
    channel, group = (
        quantize_weight(parse_scheme("w8"), weight),
        quantize_weight(parse_scheme("w4g32"), weight),
    )
    assert (channel.axis, channel.group_size, channel.scales.shape) == (0, None, (4,))
    assert (group.axis, group.group_size, group.scales.shape) == (None, 32, (4, 2))
    assert int(channel.codes.min()) == -127 or int(channel.codes.max()) == 127
    for tensor in (channel, group):
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.zero_points is None
        assert tensor.codes.dtype == torch.int8
        assert tensor.codes.is_contiguous()


def test_asymmetric_groups_use_all_codes_of_a_shifted_weight() -> None:
    weight = weight_of(16, 256) + 3
    result = quantize_weight(parse_scheme("w4g32a"), weight)
    assert result.codes.dtype == torch.uint8
    assert result.zero_points is not None
    assert result.zero_points.shape == result.scales.shape == (16, 8)
    products = result.zero_points * result.scales  # GGUF stores them, as float16
    assert torch.equal(products.half().float(), products)
    symmetric = quantize_weight(parse_scheme("w4g32"), weight)
    assert sqnr_db(weight, result) > sqnr_db(weight, symmetric) + 3


def test_below_eight_bits_search_and_eight_bits_cover_by_default() -> None:
    weight = weight_of(16, 256)
    methods = {"w8": "minmax", "w4g32": "mse", "w4": "mse", "w5g32": "mse", "w6g16": "mse"}
    for name, method in methods.items():
        scheme = parse_scheme(name)
        assert scheme.default_range == method
        assert torch.equal(
            quantize_weight(scheme, weight).codes,
            quantize_weight(scheme, weight, scheme.default_range).codes,
        )


def test_more_bits_and_smaller_groups_lose_less() -> None:
    weight = weight_of(64, 512)
    names = ["w4", "w4g128", "w4g64", "w4g32", "w5g32", "w6g16", "w8", "w8g32"]
    ratios = [sqnr_db(weight, quantize_weight(parse_scheme(name), weight)) for name in names]
    assert ratios == sorted(ratios)
    assert ratios[3] > 21  # a Gaussian in groups of 32: 21.3 dB
    assert ratios[-2] > 40


def test_sqnr_of_the_ends() -> None:
    exact = quantize_weight(parse_scheme("w8"), torch.tensor([[127.0, 1.0]]))
    assert sqnr_db(torch.tensor([[127.0, 1.0]]), exact) == math.inf
    assert sqnr_db(torch.zeros(1, 2), exact) == -math.inf


def test_weights_that_require_gradients_give_plain_codes() -> None:
    weight = weight_of(2, 64).requires_grad_()
    assert not quantize_weight(parse_scheme("w4g32"), weight).scales.requires_grad


@pytest.mark.parametrize("name", ["w4g32", "w4g128"])
def test_groups_must_divide_the_rows(name: str) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        quantize_weight(parse_scheme(name), weight_of(4, 48))


def test_float_has_no_codes() -> None:
    assert FLOAT.is_float
    with pytest.raises(ValueError, match="no codes"):
        quantize_weight(FLOAT, weight_of(2, 2))


@pytest.mark.parametrize(
    "made",
    [
        lambda: Affine(3),  # type: ignore[arg-type]
        lambda: Affine(4, 48),
        lambda: Affine(5),
        lambda: Affine(6, 32),
        lambda: Affine(4, 16),
        lambda: Affine(8, 32, symmetric=False),
        lambda: Affine(4, symmetric=False),
        lambda: Codebook(5),  # type: ignore[arg-type]
        lambda: Codebook(4, 0),
        lambda: Codebook(3, group_size=16),
        lambda: Codebook(4, 2, 32, is_table=True),
    ],
)
def test_fields_that_no_file_holds_are_refused(made: Callable[[], Scheme]) -> None:
    with pytest.raises(ValueError, match="bits|group_size|books|4-bit groups"):
        made()
