"""Calibration layer by layer walks any family's blocks; what a bias adds is no linear's to make."""

import pytest
import torch
from support.small_families import SMALL, random_weights, small_config
from torch import Tensor

from edgekit.models.layerwise import layer_codes
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import preset, resolve, uniform
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

TEXTS = [[(17 * i + 5 * text) % 300 + 10 for i in range(40)] for text in range(4)]


@pytest.mark.parametrize("name", SMALL)
def test_a_linear_lacks_nothing_where_nothing_was_rounded_before_it(name: str) -> None:
    """Codes of 8 bits are all but exact, so what each linear should give is what it gives."""
    config = small_config(name)
    weights = random_weights(config)
    table = {HEAD: weights[EMBEDDING], **weights}
    shapes, _ = config.tied_shapes()
    lacking: dict[int, float] = {}

    def choose(weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
        hessian = inputs.hessian_of(weight)
        share = inputs.lacking(weight, hessian).norm() / (weight @ hessian).norm()
        lacking[len(lacking)] = float(share)
        return quantize_weight(scheme, weight)

    found = layer_codes(
        config.architecture,
        resolve(preset("int8"), shapes),
        table.__getitem__,
        table.__getitem__,
        TEXTS,
        choose,
    )
    linears = {tensor for tensor, shape in shapes.items() if len(shape) == 2} - {EMBEDDING, HEAD}
    assert found.keys() == linears
    assert len(lacking) == len(linears)
    assert max(lacking.values()) < 0.05


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_gptq_beats_rounding_on_what_it_was_calibrated_with(name: str) -> None:
    """By the error of the last layer's states, the sum of all before it."""
    config = small_config(name)
    weights = random_weights(config)
    table = {HEAD: weights[EMBEDDING], **weights}
    shapes, _ = config.tied_shapes()
    rows = resolve(uniform(parse_scheme("w4g32")), shapes)
    ends = {}
    for method, choose in (
        ("gptq", gptq),
        ("rtn", lambda w, inputs, scheme: quantize_weight(scheme, w)),
    ):
        kept = _Last()
        layer_codes(
            config.architecture,
            rows,
            table.__getitem__,
            table.__getitem__,
            TEXTS,
            choose,
            kept=kept,
        )
        exact, quantized = kept.last
        ends[method] = float((exact - quantized).norm())
    assert ends["gptq"] < 0.8 * ends["rtn"]


class _Last:
    """Keeps the states behind the last layer but one, of which the last layer is made."""

    last: tuple[Tensor, Tensor]

    def load(self, index: int) -> None:
        return None

    def states(self, index: int) -> None:
        return None

    def save(self, index: int, codes: object, states: tuple[Tensor, Tensor] | None) -> None:
        if states is not None:
            self.last = torch.clone(states[0]), torch.clone(states[1])
