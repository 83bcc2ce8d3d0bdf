"""Observers, activation parameters and calibration files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.observers import (
    AVERAGING,
    BINS,
    OBSERVER_METHODS,
    PERCENTILE,
    activation_parameters,
    observer,
)


def _batches(count: int, size: int = 5000, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * (1 + 0.1 * i) for i in range(count)]


def _range(method: str, batches: list[Tensor]) -> tuple[float, float]:
    found = observer(method)
    for batch in batches:
        found.observe(batch)
    return found.range()


def test_a_few_mini_batches_count_alike() -> None:
    batches = _batches(7)
    low, high = _range("moving-average", batches)
    assert low == pytest.approx(np.mean([batch.min() for batch in batches]), rel=1e-6)
    assert high == pytest.approx(np.mean([batch.max() for batch in batches]), rel=1e-6)


def test_many_mini_batches_are_averaged_exponentially() -> None:
    ends = [1.0] * 100 + [2.0] * 50
    _, high = _range("moving-average", [torch.tensor([0.0, end]) for end in ends])
    assert high == pytest.approx(2 - (1 - AVERAGING) ** 50, rel=1e-5)


def test_percentiles_are_those_of_all_values() -> None:
    batches = _batches(5, 40_000)
    low, high = _range("percentile", batches)
    values = torch.cat(batches).numpy()
    width = 2.0 ** np.ceil(np.log2(np.abs(values).max())) / BINS
    assert abs(high - np.quantile(values, PERCENTILE / 100)) <= 2 * width
    assert abs(low - np.quantile(values, 1 - PERCENTILE / 100)) <= 2 * width
    assert high < values.max()


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_histograms_do_not_depend_on_the_order(method: str) -> None:
    batches = [torch.zeros(3), *_batches(4), torch.full((9,), 40.0)]
    assert _range(method, batches) == _range(method, batches[::-1])


def test_least_error_beats_minimum_and_maximum() -> None:
    values = torch.cat([*_batches(1, 20_000), torch.tensor([60.0, -80.0])])
    errors = {}
    for method in ("moving-average", "mse"):
        parameters = activation_parameters(*_range(method, [values]))
        errors[method] = float((parameters.fake_quantize(values) - values).square().sum())
    assert errors["mse"] < errors["moving-average"]


def test_least_error_keeps_a_range_without_a_tail() -> None:
    low, high = _range("mse", [torch.linspace(-1, 3, 10_001)])
    assert (low, high) == pytest.approx((-1, 3), abs=0.11)


@pytest.mark.parametrize("method", OBSERVER_METHODS)
def test_an_activation_after_relu_starts_at_zero(method: str) -> None:
    low, high = _range(method, [batch.relu() for batch in _batches(3)])
    assert low == 0
    assert high > 1


@pytest.mark.parametrize("method", OBSERVER_METHODS)
@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "never seen"),
        ([torch.empty(0)], "empty"),
        ([torch.tensor([1.0, float("nan")])], "NaN"),
        ([torch.tensor([1.0, float("inf")])], "infinities"),
    ],
)
def test_what_cannot_be_calibrated_with_is_refused(
    method: str, batches: list[Tensor], said: str
) -> None:
    with pytest.raises(EdgekitError, match=said):
        _range(method, batches)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(EdgekitError, match="allowed are moving-average, percentile, mse"):
        observer("kl")


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-5.0, -2.0), (1e-6, 2e-6)])
def test_parameters_are_torchs_and_zero_is_exact(low: float, high: float) -> None:
    found = activation_parameters(low, high)
    assert float(np.float32(found.scale)) == found.scale
    values = torch.linspace(low * 1.2, high * 1.2, 4001)
    expected = torch.fake_quantize_per_tensor_affine(values, found.scale, found.zero_point, 0, 255)
    # torch multiplies by the reciprocal: where a value lies between two codes it may take the other
    steps = ((found.fake_quantize(values) - expected) / found.scale).abs()
    assert float(steps.max()) <= 1.001
    from_edge = ((values.double() / found.scale) % 1 - 0.5).abs()
    assert bool((from_edge[steps > 0.5] < 1e-3).all())
    assert found.fake_quantize(torch.zeros(1)).item() == 0
    codes = found.codes(values).float()
    torch.testing.assert_close(
        (codes - found.zero_point) * found.scale, found.fake_quantize(values)
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1e-44), (0.0, float("inf")), (float("inf"), float("inf"))]
)
def test_a_range_without_a_scale_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="no usable scale"):
        activation_parameters(low, high)


@pytest.mark.parametrize("method", OBSERVER_METHODS)
@pytest.mark.parametrize("value", [0.0, 1.5, -0.3, 1e-30])
def test_a_constant_has_a_code_exactly(method: str, value: float) -> None:
    batches = [torch.full((4,), value), torch.full((2,), value)]
    low, high = _range(method, batches)
    assert low == high == batches[0][0]
    parameters = activation_parameters(low, high)
    for exact in (batches[0], torch.zeros(1)):
        assert torch.equal(parameters.fake_quantize(exact), exact)


@pytest.mark.parametrize("method", OBSERVER_METHODS)
def test_a_mini_batch_in_parts_is_one_mini_batch(method: str) -> None:
    batches, parts = _batches(3), observer(method)
    for batch in batches:
        for number, part in enumerate(batch.split(1500)):
            parts.observe(part, number == 0)
    assert parts.range() == _range(method, batches)


def test_one_value_in_each_mini_batch_is_no_constant() -> None:
    assert _range("moving-average", [torch.tensor([1.0]), torch.tensor([3.0])]) == (1.0, 3.0)


def test_a_calibration_is_read_back(tmp_path: Path) -> None:
    made = Calibration({"x": (-1.5, 2.0), "a.b#2": (0.0, 6.0)}, "mse", 64, 4)
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made
    assert made.covering(["x", "a.b#2"]) == (-1.5, 6.0)
    with pytest.raises(EdgekitError, match="no range of 'y'"):
        made.covering(["x", "y"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format 1"),
        ({"method": "guess"}, "method must be"),
        ({"samples": 0}, "samples must be"),
        ({"batches": True}, "batches must be"),
        ({"ranges": []}, "ranges must be"),
        ({"ranges": {"x": {"min": 2, "max": 1}}}, "in order"),
        ({"ranges": {"x": {"min": float("nan"), "max": 1}}}, "finite"),
        ({"ranges": {"x": {"min": "0", "max": 1}}}, "must hold min and max"),
        ({"ranges": {"x": {"min": 0, "max": 10**400}}}, "finite"),
    ],
)
def test_a_damaged_calibration_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    path = tmp_path / "c.json"
    Calibration({"x": (0.0, 1.0)}, "mse", 1, 1).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EdgekitError, match=said):
        Calibration.load(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_no_calibration_at_all_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(EdgekitError, match="JSON"):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(EdgekitError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
