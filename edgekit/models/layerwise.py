"""Quantizing a model layer by layer with calibration: each layer sees what those before give it.

The hidden states of a few texts pass through the float and the quantized model side by side, one
layer at a time, so that never more than one matrix is in memory as floats. A layer's linears are
quantized in the order in which data reaches them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig
from edgekit.models.eager import EagerBlocks
from edgekit.models.lfm2 import LFM2, Layer
from edgekit.models.weights import ReadWeight, Weight
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.tensor import QuantizedTensor

# The linears of a layer in the order in which data reaches them; those of a stage have the same
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
    read: Callable[[str], Tensor],
    codes: ReadWeight,
    texts: Sequence[Sequence[int]],
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, QuantizedTensor]:
    """Return the codes that GPTQ chooses for the linears of all layers, by name.

    `read` gives the float weights; `codes` what is outside the layers, the embedding, as it will
    be exported; `texts` are runs of token ids, each at most as long as the model's context.
    Raises EdgekitError naming the tensor that calibration cannot quantize.
    """
    schemes = {row.tensor: row.scheme for row in rows if not row.scheme.is_float}
    found: dict[str, QuantizedTensor] = {}

    def so_far(name: str) -> Weight:
        return (
            found[name] if name in found else codes(name) if ".layers." not in name else read(name)
        )

    exact, quantized = _Stream(config, read, texts), _Stream(config, so_far, texts)
    for index in range(config.num_layers):
        progress(f"calibrating layer {index + 1} of {config.num_layers}")
        for stage in STAGES:
            names = [f"model.layers.{index}.{part}.weight" for part in stage]
            names = [name for name in names if name in schemes]
            if not names:
                continue
            inputs = Inputs(read(names[0]).shape[1])
            both = zip(
                quantized.inputs(index, names[0]), exact.inputs(index, names[0]), strict=True
            )
            for seen, meant in both:
                inputs.add(seen, meant)
            for name in names:
                try:
                    found[name] = gptq(read(name), inputs, schemes[name])
                except ValueError as error:
                    raise EdgekitError(f"{name}: cannot be calibrated: {error}") from error
        exact.advance(index)
        quantized.advance(index)
    return found


class _Stream:
    """The hidden states of all texts before some layer of one model."""

    def __init__(
        self, config: ModelConfig, read: ReadWeight, texts: Sequence[Sequence[int]]
    ) -> None:
        blocks = _NamedLinears(read)
        self._model = LFM2(blocks, config, max(map(len, texts))).eval()
        self._linears = blocks.linears
        with torch.inference_mode():
            self._states = [self._model.embed_tokens(torch.tensor(list(text))) for text in texts]

    def inputs(self, index: int, name: str) -> Iterator[Tensor]:
        """Run the layer over all texts; yield what the linear of that name sees, text by text."""
        seen: list[Tensor] = []
        hook = self._linears[name].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        try:
            for _ in self._outputs(index):
                yield seen.pop()
        finally:
            hook.remove()

    def advance(self, index: int) -> None:
        """Replace the hidden states by the layer's outputs."""
        self._states = list(self._outputs(index))

    def _outputs(self, index: int) -> Iterator[Tensor]:
        layer = cast(Layer, self._model.layers[index])
        new = torch.zeros(1)  # keeps nothing of the convolution's state
        for x in self._states:
            with torch.inference_mode():
                cos, sin = self._model.rope(0, len(x))
                result = layer(x, 0, cos, sin, new, False)
            yield result


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
