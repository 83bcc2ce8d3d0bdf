"""What a module's file computes, to the last bit, and what its verification refuses."""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from support import operator_nets
from support.traced_nets import NETS, batch_for, quantized
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.onnx import network as module_onnx
from edgekit.exporters.onnx.optimised import kernels_run
from edgekit.exporters.verify.network import (
    UNDECIDED,
    ModuleVerification,
    Probe,
    compare,
    reference_case,
    verify_module,
)
from edgekit.quantize.observers import activation_parameters
from edgekit.quantize.traced.network import TIE, QuantizedNetwork
from edgekit.runtime.engines.network_engine import load_module
from edgekit.workflows.export_network import (
    export_module,
    place_module,
    quantize_placement,
)

on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="additions of other kernels are not float"
)


class _Block(nn.Module):
    """An inverted residual with squeeze and excitation, as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.filter = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        )
        self.squeeze, self.excite = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)
        self.project = nn.Sequential(
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.hardswish(self.filter(functional.hardswish(self.expand(x))))
        gate = self.squeeze(functional.adaptive_avg_pool2d(wide, 1))
        gate = functional.hardsigmoid(self.excite(functional.hardswish(gate)))
        result: Tensor = torch.relu(x + self.project(wide * gate))
        return result


def _deep() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        *(_Block(16) for _ in range(6)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 20),
    )


def _images(seed: int, rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


@lru_cache
def _network(name: str) -> tuple[QuantizedNetwork, Tensor]:
    """Return a deep or a small network, and inputs."""
    if name == "small":
        return quantized("residual", "w8a8"), batch_for("residual", 4)
    torch.manual_seed(0)
    net = _deep().train()
    with torch.no_grad():
        for seed in range(4):
            net(_images(seed, 8))
    placement = place_module(net.eval(), (_images(0),), "w8a8", 8)
    found = quantize_placement(placement, [_images(seed) for seed in range(4)])
    return found.network, _images(50)


class _Session:
    """ONNX Runtime without optimisation, or with kernels that may saturate."""

    def __init__(self, path: Path, *, optimise: bool) -> None:
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        options.graph_optimization_level = level
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = ort.InferenceSession(path, options)

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        names = [item.name for item in self._session.get_inputs()]
        return [*self._session.run(None, dict(zip(names, inputs, strict=True)))]


def _verified(name: str, path: Path, *, probe: bool = True) -> ModuleVerification:
    network, x = _network(name)
    nodes = module_onnx.write_probe(network, path, path.with_name("probe.onnx"))
    with (
        load_module("onnx", path, threads=1) as engine,
        load_module("onnx", path.with_name("probe.onnx"), threads=1) as other,
    ):
        return verify_module(engine, network, (x,), Probe(other, nodes) if probe else None)


@pytest.fixture(params=["small", "deep"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    path = tmp_path / "model.onnx"
    module_onnx.write_module(_network(request.param)[0], path, lambda stage: None)
    yield request.param, path


def test_an_honest_file_is_verified_kernel_by_kernel(written: tuple[str, Path]) -> None:
    name, path = written
    found = _verified(name, path)
    assert found.codes_checked > {"small": 10_000, "deep": 300_000}[name]
    assert 0.49 < found.max_from_rounding <= 0.5 + TIE
    assert found.rms_steps <= found.max_rms_steps
    if platform.machine() in ("x86_64", "AMD64"):
        assert found.max_steps == 0


def test_roundings_of_a_deep_network_part_and_its_bound_says_so() -> None:
    """The reason of the bound: what is decided otherwise at ties moves all that comes after."""
    small, deep = (
        verify_module(_Itself(network), network, (x,))
        for network, x in (_network("small"), _network("deep"))
    )
    for found in (small, deep):
        assert found.max_rms_steps == max(UNDECIDED, 2 * found.otherwise_rms_steps)
    assert deep.max_rms_steps > UNDECIDED


class _Itself:
    """The simulation as an engine, whose ties may be decided otherwise."""

    def __init__(self, network: QuantizedNetwork, seed: int | None = None) -> None:
        self._network, self._seed = network, seed

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        given = [torch.from_numpy(item) for item in inputs]
        if self._seed is None:
            return [item.numpy() for item in self._network.simulate(*given)]
        return [item.numpy() for item in self._network.simulate_otherwise(self._seed, *given)]


@pytest.mark.parametrize("name", ["small", "deep"])
def test_engines_that_decide_ties_otherwise_are_honest(name: str) -> None:
    network, x = _network(name)
    for seed in range(100, 104):
        verify_module(_Itself(network, seed), network, (x,))


def test_a_session_without_optimisation_is_honest(written: tuple[str, Path]) -> None:
    name, path = written
    network, x = _network(name)
    probe = path.with_name("probe.onnx")
    nodes = module_onnx.write_probe(network, path, probe)
    found = verify_module(
        _Session(path, optimise=False), network, (x,), Probe(_Session(probe, optimise=False), nodes)
    )
    assert 0 < found.max_from_rounding <= 0.5 + TIE


def test_kernels_that_saturate_are_refused(written: tuple[str, Path]) -> None:
    name, path = written
    network, x = _network(name)
    probe = path.with_name("probe.onnx")
    nodes = module_onnx.write_probe(network, path, probe)
    engine = _Session(path, optimise=True)
    with load_module("onnx", path, threads=1) as exact:
        if np.array_equal(engine.run([x.numpy()])[0], exact.run([x.numpy()])[0]):
            pytest.skip("this processor has kernels that do not saturate")
    with pytest.raises(VerificationError, match=r"tensor '.*': the file's codes lie up to"):
        verify_module(engine, network, (x,), Probe(_Session(probe, optimise=True), nodes))


def _constant(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    (held,) = (item for item in model.graph.initializer if item.name == name)
    found: NDArray[Any] = numpy_helper.to_array(held)
    return found


def _replace(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: NDArray[Any]) -> None:
    """Give one node a constant of its own."""
    name = f"spoilt_{len(model.graph.initializer)}"
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    node.input[place] = name


def _layer(model: onnx.ModelProto, operand: int) -> onnx.NodeProto:
    """Return the DequantizeLinear of the weight (1) or bias (2) of a convolution midway."""
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    if operand == 2:
        nodes = [node for node in nodes if len(node.input) > 2]
    name = nodes[len(nodes) // 2].input[operand]
    (found,) = (node for node in model.graph.node if name in node.output)
    return found


def _scale(model: onnx.ModelProto) -> None:
    node = _layer(model, 1)
    _replace(model, node, 1, _constant(model, node.input[1]) * np.float32(1.02))


def _zero_point(model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    node = nodes[len(nodes) // 2]
    zero = int(_constant(model, node.input[2]))
    _replace(model, node, 2, np.array(zero + (1 if zero < 255 else -1), np.uint8))


def _bias(model: onnx.ModelProto) -> None:
    node = _layer(model, 2)
    _replace(model, node, 0, _constant(model, node.input[0]) * np.int32(0))


def _channels(model: onnx.ModelProto) -> None:
    node = _layer(model, 1)
    codes = _constant(model, node.input[0]).copy()
    codes[[0, 1]] = codes[[1, 0]]
    _replace(model, node, 0, codes)


def _other_codes(model: onnx.ModelProto) -> None:
    """Codes of 4 bits for the same weight."""
    node = _layer(model, 1)
    codes = _constant(model, node.input[0]).astype(np.int16)
    _replace(model, node, 0, (np.rint(codes / 18) * 18).clip(-127, 127).astype(np.int8))


@pytest.mark.parametrize("spoil", [_scale, _zero_point, _bias, _channels, _other_codes])
def test_a_broken_file_is_refused(
    spoil: Callable[[onnx.ModelProto], None], written: tuple[str, Path]
) -> None:
    name, path = written
    model = onnx.load(path)
    spoil(model)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"tensor '.*': the file's codes lie up to"):
        _verified(name, path)


def test_a_file_without_its_tensors_is_refused(written: tuple[str, Path]) -> None:
    name, path = written
    model = onnx.load(path)
    renamed = next(node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    for item in model.graph.node:
        item.input[:] = ["other" if each == renamed else each for each in item.input]
        item.output[:] = ["other" if each == renamed else each for each in item.output]
    onnx.save(model, path)
    with pytest.raises(VerificationError, match="the file has no tensor"):
        _verified(name, path)


@on_x86
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8a8-tensor", "w8a8-tensor-affine"])
@pytest.mark.parametrize("name", NETS)
def test_the_simulation_is_the_file_bit_for_bit(name: str, scheme: str, tmp_path: Path) -> None:
    network, path = quantized(name, scheme), tmp_path / "model.onnx"
    module_onnx.write_module(network, path, lambda stage: None)
    with load_module("onnx", path, threads=1) as engine:
        for size in (1, 7):
            x = batch_for(name, size, seed=70)
            found = engine.run([x.numpy()])
            for ours, theirs in zip(network.simulate(x), found, strict=True):
                assert torch.equal(ours, torch.from_numpy(theirs))


@on_x86
@pytest.mark.parametrize("name", operator_nets.CASES)
def test_each_operator_is_simulated_bit_for_bit(name: str, tmp_path: Path) -> None:
    given = operator_nets.inputs(name, 4)
    placement = place_module(
        operator_nets.trained(name), (given,), operator_nets.CASES[name].scheme, 8
    )
    batches = [operator_nets.inputs(name, 8, seed) for seed in range(3)]
    network = quantize_placement(placement, batches).network
    path = tmp_path / "model.onnx"
    module_onnx.write_module(network, path, lambda stage: None)
    x = operator_nets.inputs(name, 5, seed=77)
    with load_module("onnx", path, threads=1) as engine:
        (found,) = engine.run([x.numpy()])
    assert torch.equal(network.simulate(x)[0], torch.from_numpy(found))


def test_an_artifact_keeps_the_bound_of_its_network(tmp_path: Path) -> None:
    network, x = _network("deep")
    case = reference_case(network, (x,), 0.75)
    case.save(tmp_path / "reference.safetensors")
    found = compare(_Itself(network), [type(case).load(tmp_path / "reference.safetensors")])
    assert found.max_rms_steps == 1.5


def test_an_artifact_from_before_says_what_to_do(tmp_path: Path) -> None:
    network, x = _network("small")
    path = tmp_path / "reference.safetensors"
    case = reference_case(network, (x,), 0.75)
    case.save(path)
    held = load_file(path)  # as it was written before it held its bound
    del held["otherwise"]
    save_file(held, path)
    with pytest.raises(EdgekitError, match="holds no bound: export it again"):
        type(case).load(path)


@pytest.mark.parametrize("seed", range(3))
def test_a_softmax_before_a_layer_is_rounded_as_it_should(seed: int, tmp_path: Path) -> None:
    """YOLO's distribution of distances: QLinearSoftmax multiplies by floor(1 / scale)."""

    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores, self.mean = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            shares = self.scores(x).reshape(-1, 4, 4, 25).transpose(1, 2).softmax(1)
            found: Tensor = self.mean(shares.transpose(2, 3))
            return found

    torch.manual_seed(seed)
    net, x = Distances().eval(), torch.randn(4, 3, 5, 5)
    artifact = export_module(net, (x,), tmp_path / "a", target="onnx", calibration=[x], max_batch=4)
    figures = artifact.manifest.verification
    assert figures["codes_checked"] > 0
    assert figures["max_from_rounding"] <= 0.5 + TIE
    assert figures["rms_steps"] == 0
    ran = [name for name, _ in kernels_run(artifact.model_path)]
    assert "QLinearSoftmax" in ran


def test_a_reciprocal_scale_covers_the_range() -> None:
    for most in (1.0, 0.999, 0.3, 0.01):
        usual = activation_parameters(0, most)
        found = activation_parameters(0, most, reciprocal=True)
        assert usual.scale <= found.scale < 1.01 * usual.scale
        assert np.float32(1) / np.float32(found.scale) == round(1 / found.scale)
