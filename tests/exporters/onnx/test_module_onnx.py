"""Modules in onnxruntime: integer kernels, outputs as simulated, codes verbatim, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from support.traced_nets import NETS, batch_for, quantized, steps_apart
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import EdgekitError
from edgekit.exporters.onnx.network import check_network, write_module
from edgekit.exporters.onnx.transposed import sub_pixel
from edgekit.quantize.traced.calibrate import calibrate
from edgekit.quantize.traced.fold import fold_batch_norms
from edgekit.quantize.traced.network import QuantizedNetwork, quantize_module
from edgekit.quantize.traced.operators import TRANSPOSED
from edgekit.quantize.traced.placement import place
from edgekit.quantize.traced.schemes import LayerRecipe
from edgekit.quantize.traced.trace import trace
from edgekit.runtime.engines.network_engine import load_module

FLOAT_LAYERS = {"Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "ConvInteger"}
INTEGER_LAYERS = {"QLinearConv", "QGemm"}


def _write(network: QuantizedNetwork, folder: Path) -> Path:
    path = folder / "model.onnx"
    write_module(network, path, lambda stage: None)
    return path


def _optimized(path: Path) -> list[str]:
    """Return the operators that onnxruntime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor-affine", "w4a8", "float"])
@pytest.mark.parametrize("name", NETS)
def test_the_engine_computes_what_was_simulated(name: str, scheme: str, tmp_path: Path) -> None:
    network = quantized(name, scheme)
    with load_module("onnx", _write(network, tmp_path), threads=1) as engine:
        for size in (1, 5, 16):
            x = batch_for(name, size, seed=70)
            steps = steps_apart(network, engine.run([x.numpy()]), x)
            if scheme == "float":
                assert float(steps.max()) < 0.01
            else:
                assert float(steps.max()) <= 2.01
                assert float(steps.square().mean().sqrt()) <= 0.5


@pytest.mark.parametrize(
    ("name", "layers", "others"),
    [
        ("separable", 4, {"QLinearGlobalAveragePool"}),
        ("residual", 5, {"QLinearAdd", "QLinearGlobalAveragePool"}),
        ("sequence", 3, {"Pad"}),
        ("joined", 3, {"Concat", "QLinearAveragePool"}),
        ("upsampling", 3, {"Slice"}),
        ("tokens", 2, {"Gather"}),
    ],
)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor-affine"])
def test_no_layer_is_left_float(
    name: str, layers: int, others: set[str], scheme: str, tmp_path: Path
) -> None:
    found = _optimized(_write(quantized(name, scheme), tmp_path))
    assert not FLOAT_LAYERS & set(found), found
    assert sum(operator in INTEGER_LAYERS for operator in found) == layers
    assert others <= set(found)


def test_nothing_is_dequantized_within_a_depthwise_net(tmp_path: Path) -> None:
    found = _optimized(_write(quantized("separable", "w8a8"), tmp_path))
    assert (found.count("QuantizeLinear"), found.count("DequantizeLinear")) == (1, 1)
    assert not {"Relu", "Clip"} & set(found)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-tensor-affine", "w4a8"])
def test_codes_and_scales_are_in_the_file_verbatim(scheme: str, tmp_path: Path) -> None:
    network = quantized("residual", scheme)
    stored = [
        numpy_helper.to_array(item)
        for item in onnx.load(_write(network, tmp_path)).graph.initializer
    ]
    for name, weight in network.weights.items():
        for part in (weight.codes, weight.scales):
            assert any(_same(item, part.numpy()) for item in stored), name
    for layer in network.layers.values():
        assert layer.bias is not None
        assert any(_same(item, layer.bias.numpy()) for item in stored), layer.weight


def _same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "dilation", "groups"),
    [
        (3, 1, 0, 0, 1, 1),
        (3, 2, 1, 1, 1, 1),
        (2, 2, 0, 0, 1, 2),
        (4, 2, 1, 0, 1, 3),
        (2, 3, 0, 2, 1, 1),
        (3, 2, 2, 1, 2, 1),
        (5, 3, 0, 1, 1, 6),
        (1, 2, 0, 1, 1, 1),
    ],
)
def test_the_sub_pixel_form_is_the_transposed_convolution(
    axes: int, kernel: int, stride: int, padding: int, extra: int, dilation: int, groups: int
) -> None:
    factory = nn.ConvTranspose1d if axes == 1 else nn.ConvTranspose2d
    layer = factory(6, 12, kernel, stride, padding, extra, groups, dilation=dilation, bias=False)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-9, 10, layer.weight.shape, generator=generator)
    layer.weight.data = codes.float()
    x = torch.randint(-9, 10, (2, 6, *[5, 4][:axes]), generator=generator).float()
    traced = trace(layer, (x,))
    (node,) = (n for n in traced.graph_module.graph.nodes if n.target in TRANSPOSED)
    form = sub_pixel(node, codes.to(torch.int8), 0)
    conv = functional.conv1d if axes == 1 else functional.conv2d
    wide: Tensor = conv(x, form.codes.float(), padding=form.padding, groups=form.groups)
    split = wide.reshape(2, 12, *form.strides, *form.lengths)
    order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    full = split.permute(0, 1, *order).reshape(
        2, 12, *[a * b for a, b in zip(form.lengths, form.strides, strict=True)]
    )
    cut = [slice(a, b) for a, b in zip(form.starts, form.ends, strict=True)]
    assert torch.equal(full[(slice(None), slice(None), *cut)], layer(x))


def test_per_channel_zero_points_are_refused_before_any_work() -> None:
    with pytest.raises(EdgekitError, match=r"stem\.0\.weight: target onnx cannot hold w8a8-affine"):
        check_network(quantized("separable", "w8a8-affine"))


def test_an_operator_without_a_form_is_named_with_its_line(tmp_path: Path) -> None:
    class Sorting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(x, 1)

    x = torch.rand(2, 3)
    traced = fold_batch_norms(trace(Sorting(), (x,)))
    network = QuantizedNetwork(traced, {}, {}, {})
    with pytest.raises(
        EdgekitError, match=r"no form of aten\.cumsum\.default \(.*test_module_onnx"
    ):
        _write(network, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_float_operators_beside_quantized_layers(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.out = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = functional.leaky_relu(self.conv(x), 0.1) - 0.5 * x.mean(1, keepdim=True)
            x = functional.elu(x[:, :, 1:5:2].permute(0, 2, 3, 1)).transpose(1, 2) / 3
            x = torch.tanh(self.out(x.flatten(1, 2)))
            x = functional.hardtanh(torch.add(x, x.sigmoid(), alpha=2), -1, 1)
            return torch.softmax(x, -1), functional.hardsigmoid(x).unsqueeze(1).squeeze(1) @ x.mT

    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    traced = fold_batch_norms(trace(net, (x,), 4))
    placement = place(traced, LayerRecipe.uniform("w8a8"))
    network = quantize_module(placement, calibrate(placement, [torch.randn(4, 3, 8, 8)]))
    with load_module("onnx", _write(network, tmp_path), threads=1) as engine:
        for size in (1, 4):
            given = torch.randn(size, 3, 8, 8)
            steps = steps_apart(network, engine.run([given.numpy()]), given)
            assert float(steps.max()) <= 2


def test_what_the_engine_refuses_is_one_line(tmp_path: Path) -> None:
    path = _write(quantized("separable", "w8a8"), tmp_path)
    with load_module("onnx", path, threads=1) as engine:
        with pytest.raises(EdgekitError, match="takes 1 inputs, got 2"):
            engine.run([np.zeros(1), np.zeros(1)])
        with pytest.raises(EdgekitError, match="onnxruntime failed on the module: "):
            engine.run([np.zeros((1, 3, 16, 16), np.float64)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EdgekitError):
        load_module("onnx", path)
