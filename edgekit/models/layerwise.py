"""Quantizing a model layer by layer with calibration: each layer sees what those before give it.

The hidden states of a few texts pass through the float and the quantized model side by side, one
layer at a time, so that never more than one layer is in memory as floats. A layer's linears are
quantized in the order in which data reaches them, and it passes through each of them once.
Activations are not rounded: which rounding an engine does is not known here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from edgekit.common.progress import Steps, no_steps
from edgekit.errors import EdgekitError
from edgekit.models.architecture import Architecture, Linear
from edgekit.models.decoder import Decoder, LayerModule, Place
from edgekit.models.eager import EagerBlocks
from edgekit.models.weights import ReadWeight, floats
from edgekit.quantize.gptq import Inputs
from edgekit.quantize.recipe import Resolved, in_layers
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight

_TOKENS = 512
"""Tokens that pass through a feed-forward, and into `Inputs`, together."""

Codes = dict[str, QuantizedTensor]
Choose = Callable[[Tensor, Inputs, Scheme], QuantizedTensor]
"""From a linear's float weight and what it sees in calibration to codes of a scheme."""
Sample = tuple[Tensor, Tensor]
"""What a linear sees, and what it was meant to see or to give."""
Add = Callable[[Inputs, Tensor, Tensor], None]
"""`Inputs.add_inputs` or `Inputs.add_outputs`, which take the two of a sample."""
States = tuple[Tensor, Tensor]
"""The hidden states `[tokens, d]` of all texts in the float and in the quantized model."""


class Kept(Protocol):
    """Where finished layers are kept, so that a killed run goes on behind them."""

    def load(self, index: int) -> Codes | None:
        """Return the codes of a layer, None where it was not finished."""
        ...

    def states(self, index: int) -> States | None:
        """Return the hidden states behind the last layer that was finished, None without them."""
        ...

    def save(self, index: int, codes: Codes, states: States | None) -> None:
        """Keep the codes of a layer and the states behind it, which the last layer has not."""
        ...


class _NothingKept:
    def load(self, index: int) -> Codes | None:
        return None

    def states(self, index: int) -> States | None:
        return None

    def save(self, index: int, codes: Codes, states: States | None) -> None:
        pass


def layer_codes(
    architecture: Architecture,
    rows: Sequence[Resolved],
    read: Callable[[str], Tensor],
    codes: ReadWeight,
    texts: Sequence[Sequence[int]],
    choose: Choose,
    progress: Steps = no_steps,
    kept: Kept | None = None,
) -> Codes:
    """Return the codes that `choose`, such as GPTQ, gives the linears of all layers.

    `read` gives the float weights; `codes` what is outside the layers, the embedding, as it will
    be exported; `texts` are runs of token ids, each at most as long as the model's context.
    Raises EdgekitError naming the tensor that calibration cannot quantize.
    """
    kept = kept or _NothingKept()
    wanted = {row.tensor: row for row in rows if not row.scheme.is_float}
    found: Codes = {}

    def so_far(name: str) -> Weight:
        if name in found:
            return found[name]
        return read(name) if in_layers(name) else codes(name)

    def codes_of(linears: Sequence[Linear], samples: Iterable[Sample], add: Add) -> Codes:
        names = [linear.weight.name for linear in linears]
        some = [wanted[name] for name in names if name in wanted]
        return _codes_of(some, samples, add, read, choose) if some else {}

    exact, quantized = Stream(architecture, read, texts), Stream(architecture, so_far, texts)
    total, done = len(architecture.layers), 0
    while done < total and (layer := kept.load(done)) is not None:
        found |= layer
        done += 1
    if 0 < done < total:
        _go_on(exact, quantized, done, kept.states(done - 1))
    for index in range(done, total):
        progress(index, total, f"layer {index + 1}")
        layer = {}
        for half, (_, block) in enumerate(architecture.layers[index].halves):
            # Samples are made as they are used, from states that `leave` changes in place: so the
            # float model leaves the half when its entry is sampled, and the quantized one, which
            # is held against the states that the float model then has, at the very end.
            both = zip(quantized.entering(index, half), exact.entering(index, half), strict=True)
            layer |= codes_of(block.entering, both, Inputs.add_inputs)
            found |= layer
            exact.leave(index, half, exact.leaving(index, half))
            seen = list(quantized.leaving(index, half))
            leaving = _wanted(exact, quantized, seen, _bias(block.leaving, read))
            layer |= codes_of([block.leaving], leaving, Inputs.add_outputs)
            found |= layer
            quantized.leave(index, half, seen)
        kept.save(index, layer, (exact.states, quantized.states) if index + 1 < total else None)
    progress(total, total, "layers")
    return found


def _go_on(exact: "Stream", quantized: "Stream", done: int, states: States | None) -> None:
    """Bring the hidden states of both models behind the layers that are done."""
    if states is not None:
        exact.states, quantized.states = states
        return
    for index in range(done):
        for half in range(2):
            for stream in (exact, quantized):
                stream.leave(index, half, stream.leaving(index, half))


def _bias(linear: Linear, read: Callable[[str], Tensor]) -> Tensor:
    """Return what a linear adds to its product, which no code can change."""
    return torch.zeros(1) if linear.bias is None else read(linear.bias.name).float()


def _wanted(
    exact: "Stream", quantized: "Stream", pieces: Iterable[Tensor], bias: Tensor
) -> Iterator[Sample]:
    """Yield what the last linear of a half sees, and what its product should be.

    With the residual and the bias it should give what the float model, which is behind the half,
    has.
    """
    start = 0
    for seen in pieces:
        part = slice(start, start + len(seen))
        yield seen, exact.states[part] - quantized.states[part] - bias
        start = part.stop


def _codes_of(
    rows: Sequence[Resolved],
    samples: Iterable[Sample],
    add: Add,
    read: Callable[[str], Tensor],
    choose: Choose,
) -> Codes:
    """Return the codes of linears that see the same samples, which `add` takes."""
    inputs = Inputs(rows[0].shape[1])
    for sample in samples:
        add(inputs, *sample)
    result = {}
    for row in rows:
        try:
            result[row.tensor] = choose(read(row.tensor), inputs, row.scheme)
        except ValueError as error:
            raise EdgekitError(f"{row.tensor}: cannot be calibrated: {error}") from error
    return result


class Stream:
    """The hidden states `[tokens, d]` of all texts in one model, before some half of a layer.

    Half 0 is what mixes positions, half 1 what mixes channels (`Layer.halves`).

    Weights are kept as floats while the states pass through them.
    """

    def __init__(
        self, architecture: Architecture, read: ReadWeight, texts: Sequence[Sequence[int]]
    ) -> None:
        self._read = read
        self._floats: dict[str, Tensor] = {}
        self._lengths = [len(text) for text in texts]
        self._model = Decoder(EagerBlocks(self._float), architecture, max(self._lengths)).eval()
        self.states: Tensor = self._model.embed_tokens(
            torch.tensor([token for text in texts for token in text])
        )
        self._floats.clear()

    def entering(self, index: int, half: int) -> Iterator[Tensor]:
        """Yield, piece by piece, what the first linears of a half see."""
        layer = self._layer(index)
        norm = layer.mlp_norm if half else layer.mixer_norm
        for piece in self.states.split(_TOKENS):
            yield norm(piece)

    @torch.inference_mode()
    def leaving(self, index: int, half: int) -> Iterator[Tensor]:
        """Yield, piece by piece, what the last linear of a half sees."""
        layer = self._layer(index)
        if half:
            for normed in self.entering(index, half):
                yield layer.mlp.hidden(normed)
        else:
            for text in self.states.split(self._lengths):
                yield layer.mixer.mixed(layer.mixer_norm(text), self._place(len(text)), False)
        self._floats.clear()

    @torch.inference_mode()
    def leave(self, index: int, half: int, pieces: Iterable[Tensor]) -> None:
        """Pass the last linear of a half, given what it sees, and so the half.

        A piece changes the states that it was made of and no others, so `leaving` may make them as
        they are used.
        """
        layer = self._layer(index)
        linear = layer.mlp.down if half else layer.mixer.out
        start = 0
        for piece in pieces:
            self.states[start : start + len(piece)] += linear(piece)
            start += len(piece)
        self._floats.clear()

    def _place(self, length: int) -> Place:
        return self._model.place(torch.zeros(1, dtype=torch.long), length)

    def _layer(self, index: int) -> LayerModule:
        return cast(LayerModule, self._model.layers[index])

    def _float(self, name: str) -> Tensor:
        if name not in self._floats:
            self._floats[name] = floats(self._read(name))
        return self._floats[name]
