"""The short convolution of LFM2, by transformers, as a module: conv1d static, layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

import edgekit
from edgekit.exporters.inspect.report import inspect
from edgekit.quantize.traced.schemes import LayerRecipe, LayerRule, LayerScheme
from edgekit.workflows.export_network import place_module

SHAPE = (1, 12, 32)
STATIC = LayerRecipe((LayerRule(r"(conv|out_proj)\.weight", LayerScheme.parse("w8a8")),), "mixed")


def _short_convolution() -> nn.Module:
    torch.manual_seed(0)
    config = Lfm2Config(hidden_size=SHAPE[-1], num_hidden_layers=1, layer_types=["conv"])
    module: nn.Module = Lfm2ShortConv(config, 0)
    return module.eval()


def _inputs(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_all_layers_of_a_short_convolution_are_found() -> None:
    placement = place_module(_short_convolution(), (_inputs(0),))
    found = [str(layer.weight.target) for layer, _ in placement.layers.values()]
    assert found == ["in_proj.weight", "conv.weight", "out_proj.weight"]


@pytest.mark.parametrize("target", ["executorch", "onnx"])
def test_a_recipe_makes_some_layers_static(target: str, tmp_path: Path) -> None:
    module = _short_convolution()
    artifact = edgekit.export_module(
        module,
        (_inputs(0),),
        tmp_path / "block",
        target=target,
        recipe=STATIC,
        calibration=[_inputs(seed) for seed in range(1, 5)],
    )
    schemes = {row.tensor: row.scheme for row in artifact.manifest.tensors}
    assert schemes == {"in_proj.weight": "float", "conv.weight": "w8a8", "out_proj.weight": "w8a8"}
    linear = {"executorch": "FullyConnected", "onnx": "MatMul"}[target]
    arithmetic = inspect(artifact.folder).to_dict()["arithmetic"]
    assert (arithmetic["integer_layers"], arithmetic["float_layers"]) == (2, {linear: 1})
    assert artifact.manifest.verification["rms_steps"] <= 1.0
    x = _inputs(9)
    with edgekit.load_module(target, artifact.model_path, threads=1) as engine:
        (actual,) = engine.run([x.numpy()])
    with torch.no_grad():
        expected = module(x)
    # A product of three gates has long tails: on one range most of it lies in a few codes.
    assert float((torch.from_numpy(actual) - expected).norm() / expected.norm()) < 0.3
