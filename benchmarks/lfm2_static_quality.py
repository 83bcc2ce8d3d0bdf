"""What static activations cost lfm2-tiny beside dynamic ones, in torch, for `lfm2_static`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.jlcm import chunks as first_chunks
from edgekit.metrics.divergence import divergence, join, perplexity, score_rows
from edgekit.models.activations import per_block, per_token
from edgekit.models.architecture import Linear, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.models.decoder import Decoder
from edgekit.models.eager import EagerBlocks, float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.weights import ReadWeight, floats
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.observers import Observer, activation_parameters, observer
from edgekit.quantize.recipe import Recipe, resolve
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.quantize.traced.schemes import LayerScheme

MODEL = "lfm2-tiny"
CHUNK = 512
Rounding = Callable[[Tensor], Tensor]

LINEARS = r".*\.layers\..*"
CONVOLUTIONS = r".*\.conv\..*"
CONV1D = r".*\.conv\.conv"
FEED_FORWARD = r".*\.feed_forward\..*"
ATTENTION = r".*\.self_attn\..*"


def _per_tensor(x: Tensor) -> Tensor:
    """Round on one range of all tokens of a call (ONNX Runtime's DynamicQuantizeMatMul)."""
    return activation_parameters(*map(float, torch.aminmax(x))).fake_quantize(x)


@dataclass(frozen=True)
class Row:
    """One way of rounding activations; weights are int8 in all.

    Layers whose name matches `static` have static ranges by `method`, of their inputs and, with
    `outputs`, of their outputs; a static short convolution has int8 weights. Inputs of other
    linears are rounded by `otherwise`.
    """

    name: str
    static: str | None = None
    method: str = "moving-average"
    outputs: bool = True
    conv1d: bool = True
    otherwise: Rounding | None = field(default=lambda x: per_token(x, None))


TODAY = "dynamic, per token (ExecuTorch today)"
ROWS = (
    Row("weights alone", otherwise=None),
    Row(TODAY),
    Row("dynamic, per block of 32 (llama.cpp today)", otherwise=lambda x: per_block(x, 32)),
    Row("dynamic, per tensor", otherwise=_per_tensor),
    Row("static inputs of all layers' linears", LINEARS, outputs=False, conv1d=False),
    Row("static inputs of all layers' linears, mse", LINEARS, "mse", outputs=False, conv1d=False),
    Row("static inputs and outputs of all layers' linears", LINEARS, conv1d=False),
    Row("static inputs and outputs of all layers' linears, mse", LINEARS, "mse", conv1d=False),
    Row("static convolution blocks, conv1d included", CONVOLUTIONS),
    Row("static convolution blocks, conv1d included, mse", CONVOLUTIONS, "mse"),
    Row("static conv1d", CONV1D),
    Row("static conv1d, mse", CONV1D, "mse"),
    Row("static feed-forwards", FEED_FORWARD),
    Row("static feed-forwards, mse", FEED_FORWARD, "mse"),
    Row("static projections of attention", ATTENTION),
    Row("static projections of attention, mse", ATTENTION, "mse"),
)


class _Blocks(EagerBlocks):
    """Eager blocks that pass what enters and leaves each layer through `around(key)`."""

    def __init__(
        self, read: ReadWeight, around: Callable[[str], tuple[Rounding, Rounding]]
    ) -> None:
        super().__init__(read)
        self._around = around

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        layer = linear.weight.stem
        key = layer if parts == 1 else f"{layer}#{part}"
        return _Between(super().linear(linear, part, parts), *self._around(key))

    def short_conv(self, block: ShortConv) -> nn.Module:
        return _Between(super().short_conv(block), *self._around(block.conv.stem))


class _Between(nn.Module):
    def __init__(self, layer: nn.Module, enter: Rounding, leave: Rounding) -> None:
        super().__init__()
        self._layer, self._enter, self._leave = layer, enter, leave

    def forward(self, x: Tensor) -> Tensor:
        return self._leave(self._layer(self._enter(x)))


def _as_it_is(x: Tensor) -> Tensor:
    return x


class _Observed:
    """The ranges of all layers' inputs and outputs by each method, from one run over the texts."""

    def __init__(self, methods: Sequence[str]) -> None:
        self._methods = methods
        self._found: dict[tuple[str, str], dict[str, Observer]] = {}

    def around(self, key: str) -> tuple[Rounding, Rounding]:
        return self._observing(key, "in"), self._observing(key, "out")

    def rounding(self, key: str, end: str, method: str) -> Rounding:
        return activation_parameters(*self._found[key, end][method].range()).fake_quantize

    def _observing(self, key: str, end: str) -> Rounding:
        seen = self._found[key, end] = {name: observer(name) for name in self._methods}

        def observe(x: Tensor) -> Tensor:
            for each in seen.values():
                each.observe(x)
            return x

        return observe


def _logits(model: Decoder, chunks: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the logits of each chunk's second half."""
    found = []
    for chunk in chunks:
        with torch.inference_mode():
            logits = model.all_logits(torch.tensor([list(chunk[:-1])]), torch.zeros(1).long())
        found.append(logits[len(chunk) // 2 :].clone().numpy())
    return found


def _int8_weights(source: ModelSource) -> dict[str, Tensor]:
    """Return what the codes of `--int8` stand for."""
    table, tied = source.config.tied_shapes()
    rows = resolve(Recipe.named("int8"), table, tied)
    return {
        name: floats(weight) for name, weight in quantize_tensors(rows, source.checkpoint.tensor)
    }


def _model(
    config: ModelConfig, weights: dict[str, Tensor], row: Row, observed: _Observed
) -> Decoder:
    static = re.compile(row.static or "$^")

    def around(key: str) -> tuple[Rounding, Rounding]:
        is_conv1d = key.endswith(".conv.conv")
        if static.fullmatch(key) and (row.conv1d or not is_conv1d):
            enter = observed.rounding(key, "in", row.method)
            leave = observed.rounding(key, "out", row.method)
            return enter, leave if row.outputs else _as_it_is
        return _as_it_is if is_conv1d else row.otherwise or _as_it_is, _as_it_is

    def read(name: str) -> Tensor:
        weight, key = weights[name], name.removesuffix(".weight")
        if row.conv1d and key.endswith(".conv.conv") and static.fullmatch(key):
            weight = _int8_conv(weight)
        return weight

    return Decoder(_Blocks(read, around), config.architecture, CHUNK).eval()


def _int8_conv(weight: Tensor) -> Tensor:
    codes: QuantizedTensor = LayerScheme.parse("w8a8").quantize(weight, 0)
    return codes.dequantize()


def measure(
    stories: Path, chunks: int, calibration_chunks: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Score every row against the float model on valid.txt, with ranges from train.txt."""
    source = resolve_model(MODEL)
    config = source.config
    held_out = first_chunks(source, stories / "valid.txt", chunks, CHUNK)
    texts = first_chunks(source, stories / "train.txt", calibration_chunks, CHUNK)
    weights = _int8_weights(source)
    observed = _Observed(sorted({row.method for row in ROWS}))
    progress("calibrating")
    # Ranges are those that the quantized weights give, activations as they are.
    _logits(
        Decoder(_Blocks(weights.__getitem__, observed.around), config.architecture, CHUNK).eval(),
        texts,
    )
    progress("float model")
    read = float_reader(config, source.checkpoint)
    exact = _logits(Decoder(EagerBlocks(read), config.architecture, CHUNK).eval(), held_out)
    rows = []
    for row in ROWS:
        progress(row.name)
        found = _logits(_model(config, weights, row, observed), held_out)
        scores = join(
            [
                score_rows(logits, chunk[CHUNK // 2 + 1 :], expected)
                for logits, chunk, expected in zip(found, held_out, exact, strict=True)
            ]
        )
        result = divergence(scores)
        rows.append(
            {
                "row": row.name,
                "method": row.method if row.static else None,
                "kld": result.kld.to_dict(),
                "perplexity": perplexity(scores.nll).to_dict(),
                "same_top": result.same_top.to_dict(),
            }
        )
    return {
        "model": MODEL,
        "tokens": len(scores.nll),
        "calibration_tokens": sum(map(len, texts)),
        "reference_perplexity": result.reference_perplexity.to_dict(),
        "rows": rows,
    }
