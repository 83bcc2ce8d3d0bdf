"""`export_module`: from a module to a verified artifact folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.traced_nets import batch_for, make_net, quantized, steps_apart
from torch import Tensor, nn

import edgekit
from edgekit.errors import EdgekitError, QuantizationWarning, VerificationError
from edgekit.exporters.inspect.report import inspect
from edgekit.exporters.verify.network import ModuleVerification, verify_module
from edgekit.formats.artifact.parts import NetworkInput, TensorRow
from edgekit.formats.artifact.read import Artifact
from edgekit.quantize.calibration import Calibration
from edgekit.workflows.verify import verify_artifact


def _export(output: Path, target: str = "onnx", **options: object) -> Artifact:
    given = {"calibration": [batch_for("residual", 4, seed) for seed in range(3)]} | options
    return edgekit.export_module(
        make_net("residual"),
        (batch_for("residual", 4),),
        output,
        target=target,
        **given,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_an_artifact_runs_as_it_says(target: str, tmp_path: Path) -> None:
    artifact = _export(tmp_path / "net", target, max_batch=8, name="two blocks")
    manifest = artifact.network
    assert artifact.is_module
    assert artifact.damaged_files() == []
    assert (manifest.model_id, manifest.recipe) == ("two blocks", "w8a8")
    assert manifest.inputs == (NetworkInput("x", "float32", (4, 3, 16, 16)),)
    assert manifest.max_batch == 8
    found = manifest.verification
    assert found["verified"]
    assert found["batches"] == [1, 4, 8]
    assert found["rms_steps"] <= 0.5 < found["rms_steps_vs_float"]
    rows = {row.tensor: row for row in manifest.tensors}
    size = 8 * 8 * 9 + 4 * 8
    assert rows["one.weight"] == TensorRow("one.weight", "w8a8", (8, 8, 3, 3), size)
    assert rows["one.bias"].scheme == "int32"
    x = batch_for("residual", 3, seed=9)
    with edgekit.load_module(target, artifact.model_path, threads=1) as engine:
        (actual,) = engine.run([x.numpy()])
    with torch.no_grad():
        expected = make_net("residual")(x).numpy()
    assert np.linalg.norm(actual - expected) < 0.05 * np.linalg.norm(expected)


def test_a_module_is_no_language_model(tmp_path: Path) -> None:
    artifact = _export(tmp_path / "net")
    with pytest.raises(EdgekitError, match="is a module, not a language model"):
        _ = artifact.context
    path = artifact.folder / "edgekit.json"
    document = json.loads(path.read_text())
    del document["kind"]
    path.write_text(json.dumps(document))
    with pytest.raises(EdgekitError, match="context must be an integer"):
        Artifact.open(artifact.folder)


def test_inspect_shows_integer_layers_and_verify_needs_no_weights(tmp_path: Path) -> None:
    artifact = _export(tmp_path / "net", "executorch", max_batch=8)
    report = inspect(artifact.folder, check=True)
    said = report.text()
    assert "Residual, recipe w8a8, a module, batches of up to 8" in said
    parts = {part["name"] for part in report.to_dict()["components"]}
    assert {"convolutions, int8 per channel", "linears, int8 per channel", "biases, int32"} <= parts
    assert not any("float" in part or "norms" in part for part in parts)
    with pytest.raises(EdgekitError, match="is verified without a model"):
        verify_artifact(artifact.folder, "lfm2-tiny", lambda stage: None)
    found = verify_artifact(artifact.folder, None, lambda stage: None).verification
    assert found["verified"]
    assert found["batches"] == [4]


def test_a_saved_calibration_gives_the_same_file(tmp_path: Path) -> None:
    first = _export(tmp_path / "a", method="percentile")
    saved = first.folder / "calibration.json"
    again = _export(tmp_path / "b", calibration=saved)
    assert again.model_path.read_bytes() == first.model_path.read_bytes()
    assert json.loads(saved.read_text())["method"] == "percentile"


def test_a_path_means_the_data_that_it_means_on_the_command_line(tmp_path: Path) -> None:
    rows = torch.cat([batch_for("residual", 4, seed) for seed in range(10)])
    # A file is cut into mini-batches of 32, whatever the example's batch is.
    first = _export(tmp_path / "a", calibration=[rows[:32], rows[32:]])
    np.save(tmp_path / "x.npy", rows.numpy())
    for number, given in enumerate((tmp_path / "x.npy", str(tmp_path / "x.npy"))):
        again = _export(tmp_path / f"b{number}", calibration=given)
        assert again.model_path.read_bytes() == first.model_path.read_bytes()
    with pytest.raises(EdgekitError, match=r"none\.npz: no such file"):
        _export(tmp_path / "c", calibration=tmp_path / "none.npz")


def test_a_float_module_needs_no_calibration(tmp_path: Path) -> None:
    artifact = _export(tmp_path / "net", recipe="float", calibration=None)
    assert {row.scheme for row in artifact.manifest.tensors} == {"float"}
    assert sorted(artifact.manifest.files) == ["model.onnx", "reference.safetensors"]


def test_one_name_exports_models_and_modules(tmp_path: Path) -> None:
    x = batch_for("residual", 2)
    artifact = edgekit.export(
        make_net("residual"), (x,), tmp_path / "net", target="onnx", recipe="float"
    )
    assert artifact.manifest.model_id == "Residual"
    with pytest.raises(EdgekitError, match="nowhere"):
        edgekit.export("nowhere", tmp_path / "model", target="onnx")


def test_a_finished_network_is_exported_as_it_is(tmp_path: Path) -> None:
    network, x = quantized("residual", "w8a8"), (batch_for("residual", 4),)
    artifact = edgekit.export_network(
        network, x, tmp_path / "net", target="onnx", name="mine", recipe="trained"
    )
    assert (artifact.manifest.model_id, artifact.manifest.recipe) == ("mine", "trained")
    assert Calibration.load(artifact.folder / "calibration.json") == network.calibration
    with edgekit.load_module("onnx", artifact.model_path, threads=1) as engine:
        (actual,) = engine.run([x[0].numpy()])
    assert float(steps_apart(network, [actual], x[0]).max()) <= 1.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": None}, "need calibration data"),
        ({"calibration": []}, "calibration data is empty"),
        ({"calibration": torch.zeros(2, 3, 16, 16)}, "as a list: got one tensor"),
        ({"calibration": [torch.zeros(4, 3, 16, 16)]}, "'x' is 0 everywhere"),
        ({"method": "guess"}, "unknown calibration method"),
        ({"recipe": "w3a8"}, "unknown scheme 'w3a8'"),
        ({"recipe": "w8a8-affine"}, "target onnx cannot hold w8a8-affine"),
        ({"target": "gguf"}, "target gguf cannot hold networks of other kinds"),
        ({"target": "coreml"}, "unknown target 'coreml': allowed are executorch, onnx"),
    ],
)
def test_a_mistake_leaves_nothing(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match=said):
        _export(tmp_path / "net", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    _export(tmp_path / "net")
    with pytest.raises(EdgekitError, match="exists; give `force`"):
        _export(tmp_path / "net")
    assert _export(tmp_path / "net", recipe="w4a8", force=True).manifest.recipe == "w4a8"


class _Engine:
    """Gives what the network simulates, spoilt."""

    def __init__(self, factor: float, rows: int | None = None) -> None:
        self._factor, self._rows = factor, rows

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        (found,) = quantized("residual", "w8a8").simulate(torch.from_numpy(inputs[0]))
        return [found[: self._rows].numpy() * self._factor]


def test_verification_sees_a_lost_scale_and_a_lost_row() -> None:
    network, x = quantized("residual", "w8a8"), (batch_for("residual", 4),)
    assert verify_module(_Engine(1), network, x).rms_steps == 0
    for factor in (2.0, 0.9, float("nan")):
        with pytest.raises(VerificationError, match="the bound is"):
            verify_module(_Engine(factor), network, x)
    with pytest.raises(VerificationError, match="outputs of shapes"):
        verify_module(_Engine(1, rows=1), network, x)


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_outputs_without_an_element_are_refused(target: str, tmp_path: Path) -> None:
    class Nothing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, :0]

    with pytest.raises(VerificationError, match="every output is empty"):
        edgekit.export_module(
            Nothing(4, 4), (torch.ones(2, 4),), tmp_path / "out", target=target, recipe="float"
        )
    assert list(tmp_path.iterdir()) == []


def test_the_bound_is_what_roundings_at_ties_make_of_the_network() -> None:
    found = [
        ModuleVerification(1, 0.0, 0.0, 0.0, 9.0, otherwise, [1]) for otherwise in (0.0, 0.2, 3.0)
    ]
    assert [item.max_rms_steps for item in found] == [0.5, 0.5, 6.0]


def test_a_network_that_strays_far_from_its_float_self_warns(tmp_path: Path) -> None:
    narrow = [batch_for("residual", 4) / 100]
    ranges = _export(tmp_path / "narrow", calibration=narrow).folder / "calibration.json"
    with pytest.warns(QuantizationWarning, match="quantization moves the outputs by"):
        _export(tmp_path / "net", calibration=ranges)
