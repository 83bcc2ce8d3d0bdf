"""Modules in ExecuTorch: XNNPACK's integer kernels, outputs as simulated, codes verbatim."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.traced_nets import batch_for, quantized, steps_apart
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch.network import check_network, write_module
from edgekit.formats.pte.program import Program
from edgekit.formats.pte.xnnpack_graph import Graph, read_graph
from edgekit.quantize.calibration import Calibration
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.calibrate import calibrate
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.quantize.traced.operators import LINEAR, TRANSPOSED
from edgekit.quantize.traced.placement import place
from edgekit.quantize.traced.schemes import LayerRecipe
from edgekit.quantize.traced.trace import trace
from edgekit.runtime.engines.network_engine import load_module

SOME = [("separable", "w8a8"), ("residual", "w4a8"), ("upsampling", "w8a8"), ("tokens", "w8a8")]
REST = [
    ("sequence", "w8a8"),
    ("joined", "w8a8"),
    ("separable", "w8a8-tensor"),
    ("residual", "float"),
    ("tokens", "w8a8-tensor"),
]


@pytest.fixture(
    scope="module", params=[*SOME, *(pytest.param(x, marks=pytest.mark.slow) for x in REST)]
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, QuantizedNetwork, Path]:
    name, scheme = request.param
    network = quantized(name, scheme)
    path = tmp_path_factory.mktemp(name) / "model.pte"
    write_module(network, path, lambda stage: None)
    return name, network, path


def test_the_engine_computes_what_was_simulated(
    exported: tuple[str, QuantizedNetwork, Path],
) -> None:
    name, network, path = exported
    with load_module("executorch", path) as engine:
        for size in (1, 5, 16):  # 16 is the largest batch
            x = batch_for(name, size, seed=70)
            steps = steps_apart(network, engine.run([x.numpy()]), x)
            assert float(steps.max()) <= (2.01 if network.edges else 0.01)
            assert float(steps.square().mean().sqrt()) <= 0.5


def test_every_layer_is_an_integer_kernel_with_the_codes_verbatim(
    exported: tuple[str, QuantizedNetwork, Path],
) -> None:
    _, network, path = exported
    program = Program.open(path)
    graphs = _graphs(program)
    constants = [constant for graph in graphs for constant in graph.constants]
    if not network.layers:
        assert {constant.datatype for constant in constants} == {"fp32"}
        return
    assert not [constant for constant in constants if constant.datatype == "fp32"]
    weights = [constant for constant in constants if constant.datatype in ("qcint8", "qint8")]
    stored = {program.read(constant.data) for constant in weights}
    products = [layer for layer in network.layers.values() if layer.output is not None]
    assert len(weights) == len(products)
    for layer in products:
        weight = network.weights[layer.weight]
        assert _as_stored(layer.layer.node, weight).numpy().tobytes() in stored, layer.weight
    biases = {
        program.read(constant.data)
        for constant in constants
        if constant.datatype in ("qcint32", "qint32")
    }
    expected = {layer.bias.numpy().tobytes() for layer in products if layer.bias is not None}
    assert expected <= biases
    scales = {program.read(constant.scales) for constant in weights if constant.scales is not None}
    per_channel = [w for w in network.weights.values() if w.granularity == "channel"]
    if len(per_channel) == len(products):
        assert {weight.scales.numpy().tobytes() for weight in per_channel} <= scales


def _graphs(program: Program) -> list[Graph]:
    return [
        read_graph(program, delegate)
        for method in program.methods.values()
        for delegate in method.delegates
    ]


def _as_stored(node: torch.fx.Node, weight: QuantizedTensor) -> torch.Tensor:
    """XNNPACK keeps [out, height, width, in], for depthwise layers [1, height, width, out]."""
    codes = weight.codes
    if node.target == LINEAR:
        return codes
    if codes.ndim == 3:
        codes = codes.unsqueeze(-1)
    if (
        node.target in TRANSPOSED
        or codes.shape[1] == 1
        and len(codes) > 1
        and node.args[-1] == len(codes)
    ):
        codes = codes.transpose(0, 1)
    return codes.permute(0, 2, 3, 1).contiguous()


def test_a_global_average_is_right_at_a_small_largest_batch(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(3, 8, 6, 6)
    placement = place(trace(net, (x,), 3), LayerRecipe.uniform("w8a8"))
    network = quantize_module(placement, calibrate(placement, [x]))
    write_module(network, tmp_path / "m.pte", lambda stage: None)
    with load_module("executorch", tmp_path / "m.pte") as engine:
        for size in (1, 2, 3):
            found = engine.run([x[:size].numpy()])
            assert float(steps_apart(network, found, x[:size]).max()) <= 1.01


@pytest.mark.parametrize("function", [functional.softplus, functional.mish])
def test_what_executorch_takes_apart_reads_codes_of_its_own(
    function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """`x > 20 ? x : log(1 + exp(x))`, of one dequantized x: 52 steps off in executorch 1.5.1."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.layer(x))

    torch.manual_seed(3)
    x = torch.randn(2, 4, 6, 6)
    traced = trace(Net().eval(), (x,))
    placement = place(traced, LayerRecipe.uniform("w8a8"))
    network = quantize_module(placement, calibrate(placement, [x]))
    write_module(network, tmp_path / "net.pte", lambda stage: None)
    with load_module("executorch", tmp_path / "net.pte") as engine:
        (found,) = engine.run([x.numpy()])
    assert np.abs(found - network.simulate(x)[0].detach().numpy()).max() < 1e-5


def test_a_depthwise_net_is_one_chain_of_codes(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    write_module(quantized("separable", "w8a8"), path, lambda stage: None)
    graphs = _graphs(Program.open(path))
    nodes = [node for graph in graphs for node in graph.nodes if node != "StaticTranspose"]
    assert nodes == [
        "Convert",
        "Conv2d",
        "DepthwiseConv2d",
        "Conv2d",
        "GlobalAvgPooling2d",
        "Convert",
        "Convert",
        "FullyConnected",
        "Convert",
    ]


@pytest.mark.parametrize("scheme", ["w8a8-affine", "w8a8-tensor-affine"])
def test_affine_weights_are_refused_before_any_work(scheme: str) -> None:
    with pytest.raises(
        EdgekitError, match=f"target executorch cannot hold {scheme}: .*w8a8-tensor"
    ):
        check_network(quantized("separable", scheme))


def test_a_grouped_transposed_convolution_takes_one_scale() -> None:
    layer = nn.ConvTranspose2d(4, 4, 2, groups=2)
    x = torch.randn(2, 4, 3, 3)
    calibration = Calibration({"input_1": (-1, 1), "conv_transpose2d": (-1, 1)}, "mse", 1, 1)
    traced = trace(layer, (x,))
    for scheme, refused in (("w8a8", True), ("w8a8-tensor", False)):
        network = quantize_module(place(traced, LayerRecipe.uniform(scheme)), calibration)
        if refused:
            with pytest.raises(EdgekitError, match="groups: XNNPACK takes w8a8-tensor for it"):
                check_network(network)
        else:
            check_network(network)


def test_scales_that_the_kernels_cannot_hold_are_refused() -> None:
    calibration = Calibration({"input_1": (-1e6, 1e6), "linear": (-1e-3, 1e-3)}, "mse", 1, 1)
    placement = place(trace(nn.Linear(4, 2), (torch.zeros(2, 4),)), LayerRecipe.uniform("w8a8"))
    with pytest.raises(EdgekitError, match=r"weight: XNNPACK takes .* to 256, got"):
        check_network(quantize_module(placement, calibration))


def test_what_the_engine_refuses_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    write_module(quantized("tokens", "w8a8"), path, lambda stage: None)
    with load_module("executorch", path) as engine:
        for given in ([], [np.zeros((1, 7), np.float32)], [np.zeros((99, 7), np.int64)]):
            with pytest.raises(EdgekitError, match="executorch failed on the module: ") as caught:
                engine.run(given)
            assert "\n" not in str(caught.value)
        x = batch_for("tokens", 2)
        first, second = engine.run([x.numpy()]), engine.run([(19 - x).numpy()])
        assert not np.array_equal(first[0], second[0])  # the first is not overwritten
        np.testing.assert_array_equal(engine.run([x.numpy()])[0], first[0])
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(EdgekitError, match="damaged|truncated|cannot"):
        load_module("executorch", path)
