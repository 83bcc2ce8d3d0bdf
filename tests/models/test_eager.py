"""The reference's rounding of activations is that of the engines."""

import gguf as peer
import pytest
import torch

from edgekit.exporters.executorch import decoder as executorch
from edgekit.exporters.gguf import decoder as gguf
from edgekit.models.activations import FakeQuantize
from edgekit.models.eager import build_eager
from edgekit.models.random_weights import RandomCheckpoint
from edgekit.models.source import resolve_model
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.schemes.names import parse_scheme

WEIGHT = quantize_weight(parse_scheme("w8"), torch.ones(1, 32))  # neither of these two looks at it


def test_blocks_are_rounded_as_gguf_py_rounds_them() -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * 3
    x[2, 32:64], x[3] = 0, x[3] * 1e-3
    kind = peer.GGMLQuantizationType.Q8_0
    expected = peer.quants.dequantize(peer.quants.quantize(x.numpy(), kind), kind)
    assert torch.equal(gguf.fake_quantize(x, WEIGHT), torch.from_numpy(expected))


@pytest.mark.parametrize("fake_quantize", [gguf.fake_quantize, executorch.fake_quantize])
def test_rounding_moves_by_half_a_step_at_most_and_keeps_zeros(
    fake_quantize: FakeQuantize,
) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[1] = 0
    x[0, 3] = 0
    found = fake_quantize(x, WEIGHT)
    assert torch.equal(found[1], x[1])
    assert float(found[0, 3]) == 0
    spread = x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)
    assert bool(((found - x).abs() <= spread / 255 * 1.02).all())


def test_a_model_rounds_as_it_is_told() -> None:
    config = resolve_model("lfm2-tiny").config
    source = RandomCheckpoint(config)
    weights = {
        name: quantize_weight(parse_scheme("w8"), source.tensor(name))
        if len(shape) == 2
        else source.tensor(name)
        for name, shape in config.tensor_shapes().items()
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    tokens, start = torch.tensor([[1, 5, 9]]), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        rounded, blocks, exact = (
            build_eager(config, weights.__getitem__, 3, rounding).all_logits(tokens, start)
            for rounding in (executorch.fake_quantize, gguf.fake_quantize, lambda x, weight: x)
        )
        default = build_eager(config, weights.__getitem__, 3).all_logits(tokens, start)
    assert torch.equal(default, rounded)
    assert not torch.equal(blocks, rounded)
    # a scale for 32 values is finer than one for all
    assert float((blocks - exact).norm()) < float((rounded - exact).norm())
