"""What a module takes and returns, in plain sessions of the engines against the module in torch."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from executorch.runtime import Runtime
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from edgekit import Artifact, EdgekitError
from edgekit.formats.artifact.parts import NetworkOutput
from edgekit.workflows.export_network import export_module

TARGETS = ("executorch", "onnx")


class Record(NamedTuple):
    scores: Tensor
    anchors: Tensor


class Everything(nn.Module):
    """One tensor under many names, tensors that no operator made, and what is no tensor."""

    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("anchors", torch.tensor([[0.0, 100.3, 1e-3]]))

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.norm(self.conv(x))
        return {
            "scores": y,
            "again": y,
            "alias": (y.detach(), y.contiguous(), functional.dropout(y, 0.5, self.training)),
            "record": Record(y.relu(), self.anchors),
            "x": x,
            "weight": self.conv.weight,
            "ones": torch.ones(2, 3),
            "nothing": None,
            "height": x.shape[2],
            "batch": x.shape[0],
            "label": "cats",
        }


NAMES = [
    *("scores", "again", "alias.0", "alias.1", "alias.2", "record.scores", "record.anchors"),
    *("output_x", "weight", "ones", "batch"),
]
EXACT = ("record.anchors", "output_x", "weight", "ones", "batch")


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def images(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 4 - 2


def plain(artifact: Artifact, inputs: dict[str, Tensor]) -> list[NDArray[Any]]:
    """Run a file as its users do, without edgekit."""
    if artifact.target == "onnx":
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(str(artifact.model_path), options)
        assert [item.name for item in session.get_outputs()] == [
            item.name for item in artifact.network.outputs
        ]
        return list(session.run(None, {name: item.numpy() for name, item in inputs.items()}))
    method = Runtime.get().load_program(str(artifact.model_path)).load_method("forward")
    assert method is not None
    ordered = [inputs[item.name] for item in artifact.network.inputs]
    return [np.array(item) for item in method.execute(ordered)]


@pytest.mark.parametrize("scheme", ["float", "w8a8"])
@pytest.mark.parametrize("target", TARGETS)
def test_results_of_every_kind(target: str, scheme: str, tmp_path: Path) -> None:
    module = make(Everything)
    artifact = export_module(
        module,
        (images(2),),
        tmp_path / "net",
        target=target,
        recipe=scheme,
        calibration=[images(4, seed) for seed in range(2)],
        max_batch=4,
    )
    outputs = artifact.network.outputs
    assert [item.name for item in outputs] == NAMES
    assert outputs[0] == NetworkOutput("scores", "float32", (None, 4, 8, 8))
    assert outputs[-1] == NetworkOutput("batch", "int64", ())
    fixed = {"nothing": None, "height": 8, "label": "cats"}
    assert artifact.network.constant_outputs == fixed
    for rows in (1, 3):
        x = images(rows, 1)
        expected = [
            torch.as_tensor(item)
            for item in torch.utils._pytree.tree_leaves(module(x))
            if isinstance(item, Tensor) or item == rows
        ]
        found = plain(artifact, {"x": x})
        assert len({id(item) for item in found}) == len(NAMES)
        for name, ours, theirs in zip(NAMES, expected, found, strict=True):
            assert theirs.shape == tuple(ours.shape), name
            if name in EXACT:
                assert np.array_equal(theirs, ours.detach().numpy()), name
            else:
                bound = 1e-5 if scheme == "float" else 0.2
                np.testing.assert_allclose(theirs, ours.detach(), atol=bound)


class Masked(nn.Module):
    """An image in bytes and a mask of its columns, both given by name; the mask is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, pixels: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = self.conv((pixels.float() / 255 - 0.5) / 0.25)
        wide = mask[:, None, None, :]
        return y.masked_fill(~wide, 0.0), y * wide, ~mask, pixels[:, :0]


@pytest.mark.parametrize("scheme", ["float", "w8a8"])
@pytest.mark.parametrize("target", TARGETS)
def test_bytes_and_masks_by_name(target: str, scheme: str, tmp_path: Path) -> None:
    module = make(Masked)
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> dict[str, Tensor]:
        return {
            "mask": torch.randint(0, 2, (rows, 8), generator=generator).bool(),
            "pixels": torch.randint(
                0, 256, (rows, 3, 8, 8), generator=generator, dtype=torch.uint8
            ),
        }

    artifact = export_module(
        module,
        batch(2),
        tmp_path / "net",
        target=target,
        recipe=scheme,
        calibration=[batch(6) for _ in range(3)],
        max_batch=4,
    )
    found = [(item.name, item.dtype) for item in artifact.network.inputs]
    assert found == [("pixels", "uint8"), ("mask", "bool")]
    given = batch(3)
    bound = 1e-5 if scheme == "float" else 0.2
    *floats, mask, nothing = zip(module(**given), plain(artifact, given), strict=True)
    for ours, theirs in floats:
        np.testing.assert_allclose(theirs, ours.detach(), atol=bound)
    assert np.array_equal(mask[1], mask[0])
    assert nothing[1].shape == (3, 0, 8, 8)
    assert nothing[1].dtype == np.dtype(np.uint8)


class Gated(nn.Module):
    """A residual branch whose gate is still zero, and a class token of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.token = nn.Parameter(torch.zeros(1, 4, 1))
        self.last = nn.Conv1d(4, 3, 1)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.conv(x))
        result: Tensor = self.last(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 2))
        return result


@pytest.mark.parametrize("target", TARGETS)
def test_branches_that_are_zero_are_carried(target: str, tmp_path: Path) -> None:
    module = make(Gated)
    data = [torch.rand(4, 4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    artifact = export_module(
        module, (data[0],), tmp_path / "net", target=target, calibration=data, max_batch=4
    )
    ((found,), expected) = plain(artifact, {"x": data[1][:3]}), module(data[1][:3])
    np.testing.assert_allclose(found, expected.detach(), atol=0.05)


class _Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"x": torch.ones(2, 3), "z": torch.ones(2, 3)}, "_Pair takes no input 'z': .* x, y"),
        ({"x": torch.ones(2, 3)}, "_Pair cannot be traced"),
        ({"x": torch.ones(2, 3), "y": torch.ones(2, 3).double()}, "y is torch.float64"),
        ({"x": 3}, "a dict of them by the names"),
    ],
)
def test_inputs_that_do_not_fit_by_name(
    inputs: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    with pytest.raises(EdgekitError, match=said) as caught:
        export_module(_Pair(), inputs, tmp_path / "net", target="onnx", recipe="float")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
