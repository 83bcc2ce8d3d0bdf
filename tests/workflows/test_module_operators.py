"""Every operator through both engines: what was simulated, and on integers unless it is said."""

from pathlib import Path

import pytest
import torch
from support.operator_nets import CASES, inputs, trained
from torch import Tensor, nn

import edgekit
from edgekit.errors import EdgekitError
from edgekit.exporters.inspect.report import inspect
from edgekit.workflows.export_network import place_module

QUICK = ("conv1d", "grouped conv_transpose2d", "batch norm alone", "add, then relu6", "split")
PAIRS = [("onnx", name) for name in CASES] + [
    pytest.param("executorch", name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in CASES
]


@pytest.mark.parametrize(("target", "name"), PAIRS)
def test_an_operator_runs_as_said(target: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    artifact = edgekit.export_module(
        trained(name),
        (inputs(name, 4),),
        tmp_path / "net",
        target=target,
        recipe=case.scheme,
        calibration=[inputs(name, 8, seed) for seed in range(3)],
        max_batch=8,
    )
    found = artifact.manifest.verification
    assert found["rms_steps"] <= 1.0
    assert found["batches"] == [1, 8]
    arithmetic = inspect(artifact.folder).to_dict()["arithmetic"]
    assert (arithmetic["integer_layers"], arithmetic["float_layers"]) == (case.layers, {})
    assert arithmetic["other_float"] == getattr(case, target)
    # Against the module itself: nothing of it is lost.
    x = inputs(name, 3, seed=9)
    with edgekit.load_module(target, artifact.model_path, threads=1) as engine:
        (actual,) = engine.run([x.numpy()])
    with torch.no_grad():
        expected = trained(name)(x)
    assert float((torch.from_numpy(actual) - expected).norm() / expected.norm()) < 0.1


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) @ self.mix.T
        return result


class _Turned(_Product):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.mix.transpose(0, 1))


def test_a_weight_is_never_left_float_in_silence() -> None:
    x = (torch.randn(2, 6),)
    with pytest.raises(
        EdgekitError,
        match=r"mix: w8a8 cannot hold it: aten\.matmul\.default \(.*_operators\.py:\d+",
    ):
        place_module(_Product(), x)
    with pytest.raises(EdgekitError, match=r"mix: w8a8 cannot hold it: aten\.linear\.default"):
        place_module(_Turned(), x)
    with pytest.raises(EdgekitError, match=r"weight: w8a8 cannot hold it: aten\.conv3d\.default"):
        place_module(nn.Conv3d(3, 4, 3), (torch.randn(1, 3, 4, 4, 4),))
    assert place_module(_Product(), x, "float").layers == {}


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_an_operator_without_a_form_is_named_with_its_line(target: str, tmp_path: Path) -> None:
    class Uneven(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.adaptive_max_pool2d(x, 5)

    with pytest.raises(
        EdgekitError,
        match=rf"target {target} has no form of aten\.adaptive_max_pool2d\.default \(.*py:\d+\)",
    ):
        edgekit.export_module(
            nn.Sequential(nn.Conv2d(3, 4, 1), Uneven()),
            (torch.randn(1, 3, 12, 12),),
            tmp_path / "net",
            target=target,
            recipe="float",
        )
    assert list(tmp_path.iterdir()) == []
