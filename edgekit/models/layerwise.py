"""Quantizing a model layer by layer with calibration: each layer sees what those before give it.

The hidden states of a few texts pass through the eager model one layer at a time, so that never
more than one layer's weights are in memory as floats. A layer's linears are quantized in the order
in which data reaches them, and what they are calibrated on comes from the quantized part.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from edgekit.models.config import ModelConfig
from edgekit.models.eager import EagerBlocks
from edgekit.models.lfm2 import LFM2, Layer
from edgekit.models.weights import ReadWeight, Weight
from edgekit.quantize.gptq import Hessian, gptq
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.tensor import QuantizedTensor

# The linears of a layer in the order in which data reaches them; those of one stage have the same
# inputs.
STAGES = (
    ("conv.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("conv.out_proj", "self_attn.out_proj"),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)


def gptq_model(
    config: ModelConfig,
    rows: Sequence[Resolved],
    read: ReadWeight,
    texts: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda layer: None,
) -> dict[str, QuantizedTensor]:
    """Return the codes of the layers' linears; what is outside the layers is not among them.

    `read` gives the float weights, `texts` are runs of token ids, each at most as long as the
    model's context. `progress` hears each layer's number when it is done.
    """
    run = _Layerwise(config, read, texts)
    schemes = {row.tensor: row.scheme for row in rows if not row.scheme.is_float}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        for stage in STAGES:
            names = [f"{prefix}{part}.weight" for part in stage]
            wanted = [name for name in names if name in schemes]
            if not wanted:
                continue
            hessian = run.inputs_of(index, wanted[0]).mean()
            for name in wanted:
                weight = cast(Tensor, read(name))
                run.codes[name] = gptq(weight, hessian, schemes[name])
        run.advance(index)
        progress(index)
    return run.codes


class _Layerwise:
    """The hidden states of all texts before some layer, and the codes found so far."""

    def __init__(
        self, config: ModelConfig, read: ReadWeight, texts: Sequence[Sequence[int]]
    ) -> None:
        self.codes: dict[str, QuantizedTensor] = {}
        self._read = read
        blocks = _NamedLinears(self._weight)
        self._model = LFM2(blocks, config, max(map(len, texts))).eval()
        self._linears = blocks.linears
        with torch.inference_mode():
            self._states = [self._model.embed_tokens(torch.tensor(list(text))) for text in texts]

    def _weight(self, name: str) -> Weight:
        return self.codes[name] if name in self.codes else self._read(name)

    def inputs_of(self, index: int, name: str) -> Hessian:
        """Run the layer over all texts and sum what the linear of that name sees."""
        hessian = Hessian(self._read(name).shape[1])
        hook = self._linears[name].register_forward_pre_hook(lambda _, x: hessian.add(x[0]))
        for _ in self._outputs(index):
            pass
        hook.remove()
        return hessian

    def advance(self, index: int) -> None:
        """Replace the hidden states by the layer's outputs."""
        self._states = list(self._outputs(index))

    def _outputs(self, index: int) -> Iterator[Tensor]:
        layer = cast(Layer, self._model.layers[index])
        new = torch.zeros(1)  # keeps nothing of the convolution's state
        with torch.inference_mode():
            for x in self._states:
                cos, sin = self._model.rope(0, len(x))
                yield layer(x, 0, cos, sin, new, False)


class _NamedLinears(EagerBlocks):
    """Remembers its linears by the name of their weight; of several parts, the first."""

    def __init__(self, read: ReadWeight) -> None:
        super().__init__(read)
        self.linears: dict[str, nn.Module] = {}

    def linear(self, name: str, part: int = 0, parts: int = 1) -> nn.Module:
        """Multiply by the weight, as the base class does."""
        module = super().linear(name, part, parts)
        self.linears.setdefault(name, module)
        return module
