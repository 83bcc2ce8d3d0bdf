"""GPTQ against the elimination that it is a fast form of, and what it makes up for."""

import pytest
import torch
from support.brain_surgeon import NEAREST, steps_from_elimination
from torch import Tensor

from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import parse_scheme

ROWS, COLUMNS = 24, 320  # two blocks of columns and a part of one


def correlated(generator: torch.Generator, samples: int = 800) -> Tensor:
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator)
    strengths = torch.logspace(0, -2, COLUMNS)
    return torch.randn(samples, COLUMNS, generator=generator) * strengths @ mixing


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) / 10


@pytest.fixture
def samples() -> Tensor:
    return correlated(torch.Generator().manual_seed(2))


def seen(samples: Tensor, exact: Tensor | None = None) -> Inputs:
    inputs = Inputs(COLUMNS)
    exact = samples if exact is None else exact
    for part, meant in zip(samples.split(100), exact.split(100), strict=True):
        inputs.add_inputs(part, meant)
    return inputs


@pytest.mark.parametrize("name", ["w4", "w4g32", "w5g32", "w8", "w4g32a"])
def test_it_is_optimal_brain_surgeon(weight: Tensor, samples: Tensor, name: str) -> None:
    scheme = parse_scheme(name)
    found, wanted = gptq(weight, seen(samples), scheme), samples @ weight.t()
    assert steps_from_elimination(found, weight, samples, wanted, scheme) < NEAREST
    rounded = quantize_weight(scheme, weight)
    assert steps_from_elimination(rounded, weight, samples, wanted, scheme) > 2 * NEAREST


@pytest.mark.parametrize("name", ["w4", "w4g32"])
def test_the_outputs_are_closer_than_those_of_rounding_to_nearest(
    weight: Tensor, samples: Tensor, name: str
) -> None:
    scheme = parse_scheme(name)

    def error(restored: Tensor) -> float:
        return float(((weight - restored) @ samples.t()).square().mean())

    rounded = error(quantize_weight(scheme, weight).dequantize())
    assert error(gptq(weight, seen(samples), scheme).dequantize()) < 0.5 * rounded


def test_scales_of_two_levels_are_chosen_before_the_codes(weight: Tensor, samples: Tensor) -> None:
    """Blocks are of 256 columns; the result is a tensor that its own check lets pass."""
    weight, samples = weight[:, :256], samples[:, :256]
    inputs = Inputs(256)
    inputs.add_inputs(samples, samples)
    scheme = parse_scheme("w6g16")
    found = gptq(weight, inputs, scheme)
    assert (found.bits, found.group_size, found.scales.shape) == (6, 16, (ROWS, 16))

    def error(restored: Tensor) -> float:
        return float(((weight - restored) @ samples.t()).square().mean())

    assert error(found.dequantize()) < 0.5 * error(quantize_weight(scheme, weight).dequantize())


def test_it_makes_up_for_inputs_that_strayed(weight: Tensor, samples: Tensor) -> None:
    """The quantized part gives a tenth too much of everything: the weight shrinks by as much."""
    scheme = parse_scheme("w8")
    found = gptq(weight, seen(1.1 * samples, samples), scheme).dequantize()
    wanted = weight @ samples.t()
    assert float((1.1 * found @ samples.t() - wanted).norm() / wanted.norm()) < 0.02


def test_it_makes_up_for_what_the_residual_lacks(weight: Tensor, samples: Tensor) -> None:
    """The sum of residual and output is what counts; here the residual lost a share of X."""
    scheme = parse_scheme("w8")
    lost = samples @ (0.3 * weight).t()
    inputs = Inputs(COLUMNS)
    inputs.add_outputs(samples, samples @ weight.t() + lost)
    found = gptq(weight, inputs, scheme).dequantize() @ samples.t()
    wanted = (samples @ weight.t() + lost).t()
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("way", ["inputs", "outputs"])
def test_outputs_may_be_given_instead_of_exact_inputs(
    weight: Tensor, samples: Tensor, way: str
) -> None:
    """A layer's outputs on the float model's inputs, and those inputs: both are made up for."""
    scheme = parse_scheme("w4g32")
    exact = samples + correlated(torch.Generator().manual_seed(3)) / 10
    wanted = exact @ weight.t()
    inputs = Inputs(COLUMNS)
    if way == "inputs":
        inputs.add_inputs(samples, exact)
    else:
        inputs.add_outputs(samples, wanted)
    found = gptq(weight, inputs, scheme)
    assert steps_from_elimination(found, weight, samples, wanted, scheme) < NEAREST
    unaware = gptq(weight, seen(samples), scheme)
    assert steps_from_elimination(unaware, weight, samples, wanted, scheme) > 2 * NEAREST


@pytest.mark.parametrize("way", ["inputs", "outputs"])
def test_the_sums_are_those_of_all_samples(way: str) -> None:
    """Of many columns: a sum over the samples that is made in panels."""
    draw = torch.Generator().manual_seed(4)
    seen, meant = torch.randn(2, 60, 1100, generator=draw, dtype=torch.float64)
    weight = torch.randn(3, 1100, generator=draw)
    wanted = meant @ weight.double().t()
    if way == "outputs":
        wanted += torch.randn(60, 3, generator=draw)
    inputs = Inputs(1100)
    for part in (slice(0, 20), slice(20, 60)):
        if way == "inputs":
            inputs.add_inputs(seen[part].float(), meant[part].float())
        else:
            inputs.add_outputs(seen[part].float(), wanted[part].float())
        hessian = seen[: part.stop].t() @ seen[: part.stop] / part.stop
        torch.testing.assert_close(inputs.hessian.double(), hessian, atol=1e-5, rtol=1e-5)
    lacking = (wanted - seen @ weight.double().t()).t() @ seen / 60
    found = inputs.lacking(weight, inputs.hessian).double()
    torch.testing.assert_close(found, lacking, atol=1e-4, rtol=1e-4)


def test_all_samples_are_given_in_one_way(samples: Tensor) -> None:
    inputs = seen(samples)
    with pytest.raises(ValueError, match="add all in one way"):
        inputs.add_outputs(samples, samples[:, :ROWS])
    inputs = Inputs(COLUMNS)
    inputs.add_outputs(samples, samples[:, :ROWS])
    with pytest.raises(ValueError, match="add all in one way"):
        inputs.add_inputs(samples, samples)


def test_columns_that_are_never_used_are_rounded_to_nearest(
    weight: Tensor, samples: Tensor
) -> None:
    samples[:, :32] = 0
    scheme = parse_scheme("w4g32")
    found = gptq(weight, seen(samples), scheme)
    scales = found.scales[:, :1]
    assert torch.equal(found.codes[:, :32], (weight[:, :32] / scales).round().clamp(-8, 7).char())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing", "saw no inputs"),
        ("nan", "not finite"),
        ("columns", "expected inputs of 320 columns, got 32"),
        ("weight", "the weight holds infinities or NaN"),
        ("float", "the scheme float has no codes"),
    ],
)
def test_what_cannot_be_calibrated(
    weight: Tensor, samples: Tensor, damage: str, message: str
) -> None:
    inputs, scheme = seen(samples), parse_scheme("w4")
    if damage == "nothing":
        inputs = Inputs(COLUMNS)
    elif damage == "nan":
        inputs.add_inputs(torch.full((1, COLUMNS), torch.nan), samples[:1])
    elif damage == "columns":
        inputs = Inputs(32)
        inputs.add_inputs(torch.ones(1, 32), torch.ones(1, 32))
    elif damage == "weight":
        weight[0, 0] = torch.inf
    else:
        scheme = FLOAT
    with pytest.raises(ValueError, match=message):
        gptq(weight, inputs, scheme)
