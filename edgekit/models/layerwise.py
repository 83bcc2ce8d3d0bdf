"""Quantizing a model layer by layer with calibration: each layer sees what those before give it.

The hidden states of a few texts pass through the float and the quantized model side by side, one
layer at a time, so that never more than one layer is in memory as floats. A layer's linears are
quantized in the order in which data reaches them. Activations are not rounded: which rounding an
engine does is not known here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig
from edgekit.models.eager import EagerBlocks
from edgekit.models.lfm2 import LFM2, Layer
from edgekit.models.weights import ReadWeight, floats
from edgekit.progress import Steps, no_steps
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight

# The linears of a layer in the order in which data reaches them; those of a stage have the same
# inputs.
STAGES = (
    ("conv.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("conv.out_proj", "self_attn.out_proj"),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
_BEHIND_RESIDUAL = 1, 3
"""The stages whose output is added to the residual."""

Codes = dict[str, QuantizedTensor]
Choose = Callable[[Tensor, Inputs, Scheme], QuantizedTensor]
"""From a linear's float weight and what it sees in calibration to codes of a scheme."""


class Kept(Protocol):
    """Where finished layers are kept, so that a killed run goes on behind them."""

    def load(self, index: int) -> Codes | None:
        """Return the codes of a layer, None where it was not finished."""
        ...

    def save(self, index: int, codes: Codes) -> None:
        """Keep the codes of a layer."""
        ...


class _NothingKept:
    def load(self, index: int) -> Codes | None:
        return None

    def save(self, index: int, codes: Codes) -> None:
        pass


def layer_codes(
    config: ModelConfig,
    rows: Sequence[Resolved],
    read: Callable[[str], Tensor],
    codes: ReadWeight,
    texts: Sequence[Sequence[int]],
    progress: Steps = no_steps,
    kept: Kept | None = None,
    choose: Choose | None = None,
) -> Codes:
    """Return the codes that GPTQ, or what is to `choose` instead, gives the linears of all layers.

    `read` gives the float weights; `codes` what is outside the layers, the embedding, as it will
    be exported; `texts` are runs of token ids, each at most as long as the model's context.
    Raises EdgekitError naming the tensor that calibration cannot quantize.
    """
    kept = kept or _NothingKept()
    schemes = {row.tensor: row for row in rows if not row.scheme.is_float}
    found: Codes = {}

    def so_far(name: str) -> Weight:
        if name in found:
            return found[name]
        return codes(name) if ".layers." not in name else read(name)

    exact, quantized = _Stream(config, read, texts), _Stream(config, so_far, texts)
    total = config.num_layers
    for index in range(total):
        progress(index, total, f"layer {index + 1}")
        layer = kept.load(index)
        if layer is None:
            layer = {}
            for stage in range(len(STAGES)):
                names = [f"model.layers.{index}.{part}.weight" for part in STAGES[stage]]
                wanted = [schemes[name] for name in names if name in schemes]
                if wanted:
                    layer |= _quantize_stage(
                        exact, quantized, index, stage, wanted, read, choose or gptq
                    )
                    found |= layer
                    quantized.forget(*(row.tensor for row in wanted))
            kept.save(index, layer)
        found |= layer
        exact.advance(index)
        quantized.advance(index)
    progress(total, total, "layers")
    return found


def _quantize_stage(
    exact: "_Stream",
    quantized: "_Stream",
    index: int,
    stage: int,
    rows: Sequence[Resolved],
    read: Callable[[str], Tensor],
    choose: Choose,
) -> Codes:
    """Return the codes of linears that have the same inputs."""
    first = rows[0].tensor
    inputs = Inputs(rows[0].shape[1])
    owes = stage in _BEHIND_RESIDUAL
    both = zip(quantized.inputs(index, first), exact.inputs(index, first), strict=True)
    for (seen, residual), (meant, exact_residual) in both:
        inputs.add(seen, meant, exact_residual - residual if owes else None)
    result = {}
    for row in rows:
        try:
            result[row.tensor] = choose(read(row.tensor), inputs, row.scheme)
        except ValueError as error:
            raise EdgekitError(f"{row.tensor}: cannot be calibrated: {error}") from error
    return result


class _Reached(Exception):
    """The linear that was waited for has its inputs."""


class _Stream:
    """The hidden states of all texts before some layer of one model.

    Of the weights the current layer's are kept as floats.
    """

    def __init__(
        self, config: ModelConfig, read: ReadWeight, texts: Sequence[Sequence[int]]
    ) -> None:
        self._read = read
        self._floats: dict[str, Tensor] = {}
        blocks = _NamedLinears(self._float)
        self._model = LFM2(blocks, config, max(map(len, texts))).eval()
        self._linears = blocks.linears
        with torch.inference_mode():
            ids = torch.tensor([token for text in texts for token in text])
            embedded = self._model.embed_tokens(ids)
        self._states: list[Tensor] = list(embedded.split([len(text) for text in texts]))
        self._floats.clear()

    def forget(self, *names: str) -> None:
        """Read these weights anew."""
        for name in names:
            self._floats.pop(name, None)

    def inputs(self, index: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the linear of that name sees, text by text, and the residual beside it."""
        layer = cast(Layer, self._model.layers[index])
        seen: list[Tensor] = []
        residual: list[Tensor] = []

        def reached(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0])
            raise _Reached

        hooks = [
            self._linears[name].register_forward_pre_hook(reached),
            layer.ffn_norm.register_forward_pre_hook(lambda _, x: residual.append(x[0])),
        ]
        try:
            for state in self._states:
                residual.append(state)
                try:
                    self._run(layer, state)
                except _Reached:
                    yield seen.pop(), residual[-1]
                residual.clear()
        finally:
            for hook in hooks:
                hook.remove()

    def advance(self, index: int) -> None:
        """Replace the hidden states by the layer's outputs."""
        layer = cast(Layer, self._model.layers[index])
        for place, state in enumerate(self._states):
            self._states[place] = self._run(layer, state)
        self._floats.clear()

    def _run(self, layer: Layer, state: Tensor) -> Tensor:
        new = torch.zeros(1)  # keeps nothing of the convolution's state
        with torch.inference_mode():
            cos, sin = self._model.rope(0, len(state))
            result: Tensor = layer(state, 0, cos, sin, new, False)
        return result

    def _float(self, name: str) -> Tensor:
        if name not in self._floats:
            self._floats[name] = floats(self._read(name))
        return self._floats[name]


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
