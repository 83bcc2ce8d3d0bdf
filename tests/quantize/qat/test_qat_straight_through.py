"""Rounding with a gradient, against torch's own fake quantization and the formulas."""

import math

import pytest
import torch
from torch import Tensor, nn

from edgekit.quantize.grid import Grid
from edgekit.quantize.observers import ActivationParameters
from edgekit.quantize.qat.straight_through import (
    fake_quantize_activation,
    fake_quantize_rows,
    round_scales,
    rounded,
)
from edgekit.quantize.qat.weights import WeightQuantizer
from edgekit.quantize.scales import SCALES, SMALLEST_SCALE


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(values: Tensor, leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((values * weights).sum(), leaves))


def test_an_activation_is_rounded_and_clipped_as_torch_does() -> None:
    x = (_random(40, 50) * 2).requires_grad_()
    parameters = ActivationParameters(float(torch.tensor(0.0123)), 97)
    weights = _random(40, 50, seed=1)
    ours = fake_quantize_activation(x, parameters)
    theirs = torch.fake_quantize_per_tensor_affine(x, parameters.scale, 97, 0, 255)
    assert torch.equal(ours, parameters.fake_quantize(x.detach()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    (mine,) = _gradients(ours, [x], weights)
    assert torch.equal(mine, _gradients(theirs, [x], weights)[0])
    assert 0.05 < float((mine == 0).float().mean()) < 0.95  # some of it is clipped


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_rounded_and_clipped_as_torch_does(symmetric: bool) -> None:
    weight = _random(6, 30).requires_grad_()
    scales = torch.linspace(0.05, 0.3, 6)
    zeros = None if symmetric else torch.tensor([0, 3, 8, 9, 12, 15], dtype=torch.int32)
    limits = (-8, 7) if symmetric else (0, 15)
    weights = _random(6, 30, seed=1)
    ours = fake_quantize_rows(weight, scales, zeros, limits)
    zero_points = torch.zeros(6, dtype=torch.int32) if zeros is None else zeros
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, zero_points, 0, *limits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (mine,) = _gradients(ours, [weight], weights)
    assert torch.equal(mine, _gradients(theirs, [weight], weights)[0])
    assert (mine == 0).any()
    assert (mine != 0).any()


def test_the_gradient_of_a_learned_step_is_that_of_the_paper() -> None:
    weight = (_random(5, 40) * 0.4).requires_grad_()
    scales = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4], requires_grad=True)
    weights = _random(5, 40, seed=1)
    factor = 1 / math.sqrt(40 * 7)
    ours = fake_quantize_rows(weight, scales, None, (-8, 7), factor)
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        weight, scales, torch.zeros(5), 0, -8, 7, factor
    )
    mine = _gradients(ours, [weight, scales], weights)
    for found, expected in zip(mine, _gradients(theirs, [weight, scales], weights), strict=True):
        torch.testing.assert_close(found, expected)
    # Equation 3 of arXiv 1902.08153, written out.
    v = (weight / scales[:, None]).detach()
    slope = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))
    inside = (v > -8) & (v < 7)
    near = ((v.round() < -8) | (v.round() > 7)) == ~inside  # between the end and half a step past
    row = near.all(dim=1)
    torch.testing.assert_close(mine[1][row], (weights * slope).sum(1)[row] * factor)
    assert row.any()


def test_learned_scales_are_storable_wherever_they_are() -> None:
    scales = torch.tensor([0.1003, 1e-9, -0.5, 3.0], requires_grad=True)
    found = round_scales(scales, SCALES)
    assert torch.equal(found, SCALES.round(found.detach()))
    assert found[1] == found[2] == SMALLEST_SCALE
    assert torch.equal(_gradients(found, [scales], torch.ones(4))[0], torch.ones(4))


def test_any_rounding_passes_the_gradient() -> None:
    x = _random(9).requires_grad_()
    found = rounded(x, torch.round)
    assert torch.equal(found, x.detach().round())
    assert torch.equal(_gradients(found, [x], torch.ones(9))[0], torch.ones(9))


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    ("grid", "axis", "group_size", "method"),
    [
        (Grid(8, restricted=True), 0, None, "minmax"),
        (Grid(8, symmetric=False), 1, None, "minmax"),
        (Grid(4), None, 32, "mse"),
        (Grid(4, symmetric=False), None, 32, "mse"),
        (Grid(4), None, None, "minmax"),
    ],
)
def test_what_training_sees_is_what_the_codes_stand_for(
    grid: Grid, axis: int | None, group_size: int | None, method: str, learn: bool
) -> None:
    weight = _random(6, 64, seed=3).requires_grad_()
    quantizer = WeightQuantizer("w", grid, axis, group_size, method)  # type: ignore[arg-type]
    if learn:
        quantizer.learn(weight, nn.Module(), "scales")
        assert quantizer.learned is not None
        with torch.no_grad():
            quantizer.learned.values.mul_(0.83)  # no storable numbers, and some weights are clipped
    values, scales = quantizer.fake(weight)
    codes = quantizer.codes(weight)
    assert torch.equal(values, codes.dequantize())
    assert torch.equal(scales, codes.scales.flatten())
    assert torch.equal(codes.scales, grid.scales.round(codes.scales))
    (gradient,) = _gradients(values, [weight], torch.ones_like(weight))
    assert bool((gradient == 0).any()) == (learn or method == "mse")
