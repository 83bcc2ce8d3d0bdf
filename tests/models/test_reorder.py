"""Neurons in another order compute the same function, in our model and in transformers'."""

import pytest
import torch
from models.test_lfm2 import random_weights, small_config, theirs, tokens_of
from torch import Tensor

from edgekit.models.config import ModelConfig
from edgekit.models.eager import build_eager
from edgekit.models.reorder import grouped_orders, reordered
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import resolve, uniform
from edgekit.quantize.schemes.names import parse_scheme

TOLERANCE = 1e-5


def orders_of(config: ModelConfig, weights: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    shapes, _ = config.tied_shapes()
    rows = resolve(uniform(parse_scheme(scheme)), shapes)
    return grouped_orders(config.architecture, rows, weights.__getitem__)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_function_is_the_same(seed: int) -> None:
    config = small_config(layers=("conv", "full_attention", "conv"))
    weights = random_weights(config, seed)
    generator = torch.Generator().manual_seed(seed)
    orders = {
        f"model.layers.{index}.feed_forward": torch.randperm(128, generator=generator)
        for index in range(3)
    } | {f"model.layers.{index}.conv": torch.randperm(64, generator=generator) for index in (0, 2)}
    read = reordered(config.architecture, weights.__getitem__, orders)
    moved = {name: read(name) for name in weights}
    changed = {name for name in weights if not torch.equal(moved[name], weights[name])}
    assert {name.split(".", 3)[3] for name in changed} == {
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
        "feed_forward.w3.weight",
        "conv.in_proj.weight",
        "conv.conv.weight",
        "conv.out_proj.weight",
    }
    tokens, start = tokens_of(config, seed), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        logits = [
            build_eager(config, {**each, HEAD: each[EMBEDDING]}.__getitem__, 48)
            for each in (weights, moved)
        ]
        ours = [model.all_logits(tokens, start) for model in logits]
        others = [theirs(config, each)(tokens).logits[0] for each in (weights, moved)]
    assert float((ours[0] - ours[1]).abs().max()) < TOLERANCE
    assert float((others[0] - others[1]).abs().max()) < TOLERANCE
    assert float((ours[1] - others[0]).abs().max()) < 10 * TOLERANCE


def test_a_wrong_order_would_show() -> None:
    """The test above can fail: columns of w2 that are left where they were change the logits."""
    config = small_config()
    weights = random_weights(config, 2)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    read = reordered(
        config.architecture, weights.__getitem__, {"model.layers.0.feed_forward": order}
    )
    name = "model.layers.0.feed_forward.w2.weight"
    wrong = {each: read(each) for each in weights} | {name: weights[name]}
    tokens, start = tokens_of(config, 2), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        one, other = (
            build_eager(config, {**each, HEAD: each[EMBEDDING]}.__getitem__, 48).all_logits(
                tokens, start
            )
            for each in (weights, wrong)
        )
    assert float((one - other).abs().max()) > 1e-2


def test_orders_gather_like_neurons_where_codebooks_are_several() -> None:
    config = small_config(layers=("conv", "full_attention"))
    weights = random_weights(config, 3)
    heavy = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64]
    for name in ("w1", "w3"):  # half of the units have few large weights among small ones
        weights[f"model.layers.0.feed_forward.{name}.weight"][heavy, 4:] *= 0.01
    orders = orders_of(config, weights, "cb3x2")
    # in_proj has three blocks, for each of which two codebooks are less than one
    assert set(orders) == {f"model.layers.{index}.feed_forward" for index in (0, 1)}
    first = set(orders["model.layers.0.feed_forward"][:64].tolist())
    assert first in (set(heavy.tolist()), set(range(128)) - set(heavy.tolist()))
    assert "model.layers.0.conv" in orders_of(config, weights, "cb3x8")
    assert orders_of(config, weights, "cb3") == {}
    assert orders_of(config, weights, "w4g32") == {}
