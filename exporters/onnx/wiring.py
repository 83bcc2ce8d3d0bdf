"""The wiring of any decoder in ONNX: what `edgekit.models.decoder` is in torch, as nodes.

Built directly, not traced: the graph is small, and this way each node, name and state is the one
that the runtimes expect. What a linear, a norm or the attention is made of is given by `Blocks`.
Activations are `[batch, tokens, width]`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto

from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.exporters.onnx.padding import Places
from edgekit.exporters.onnx.states import Names
from edgekit.models.architecture import (
    Architecture,
    Attention,
    GatedMlp,
    Linear,
    Mixer,
    Norm,
    ShortConv,
)

ROWS = "num_logits_to_keep"


class Blocks(Protocol):
    """The operators that a decoder is built from; `name` is a layer's, as in the checkpoint."""

    def begin(self, mask: str, places: Places) -> None:
        """Compute what all layers share; `mask` is `[batch, so far and new]`."""
        ...

    def embedding(self, tokens: str, name: str) -> str:
        """Token ids int64 `[batch, tokens]` to hidden states."""
        ...

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Multiply by each of some matrices."""
        ...

    def biased(self, x: str, name: str) -> str:
        """Add the bias of a linear to what it gave."""
        ...

    def norm(self, x: str, name: str) -> str:
        """RMSNorm of the last axis."""
        ...

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """Return the norm of `x + y`, and `x + y`."""
        ...

    def short_conv(self, x: str, name: str, past: str, present: str) -> str:
        """Depthwise causal convolution along the tokens, after the state `past`."""
        ...

    def attention(
        self, qkv: Sequence[str], name: str, past: Sequence[str], present: Sequence[str]
    ) -> str:
        """Rotate, append to the caches of keys and values, attend."""
        ...


def build(graph: OnnxGraph, blocks: Blocks, architecture: Architecture, names: Names) -> None:
    """Write the whole model.

    It computes the logits of the last `num_logits_to_keep` tokens, 0 for all; nothing after the
    last layer's mixing of positions looks at the others.
    """
    tokens = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    rows = graph.input(ROWS, TensorProto.INT64, [])
    if names.default_rows is not None:
        graph.small(ROWS, np.array(names.default_rows, np.int64))
    vocabulary = architecture.embedding.shape[0]
    graph.output("logits", TensorProto.FLOAT, ["batch_size", names.logits_rows, vocabulary])
    places = Places(graph, tokens, mask, rows)
    blocks.begin(mask, places)
    _Model(graph, blocks, architecture, names, places).write()


class _Model:
    def __init__(
        self,
        graph: OnnxGraph,
        blocks: Blocks,
        architecture: Architecture,
        names: Names,
        places: Places,
    ) -> None:
        self._graph, self._blocks, self._names = graph, blocks, names
        self._architecture, self._places = architecture, places

    def write(self) -> None:
        layers, blocks = self._architecture.layers, self._blocks
        norms = [*(layer.mixer_norm for layer in layers[1:]), self._architecture.norm]
        x = blocks.embedding(self._places.tokens, self._architecture.embedding.stem)
        h = blocks.norm(x, layers[0].mixer_norm.weight.stem)
        for index, layer in enumerate(layers):
            final = index == len(layers) - 1
            mixed = self._mixer(layer.mixer, h, index, final)
            x = self._places.wanted(x, f"{layer.name}.residual") if final else x
            h, x = blocks.add_norm(x, mixed, layer.mlp_norm.weight.stem)
            inner = self._gated(layer.mlp, h)
            h, x = blocks.add_norm(x, inner, norms[index].weight.stem)
        (logits,) = self._linears(h, self._architecture.head)
        self._graph.node("Identity", [logits], "logits")

    def _mixer(self, block: Mixer, h: str, index: int, final: bool) -> str:
        if isinstance(block, Attention):
            return self._attention(block, h, index, final)
        return self._convolution(block, h, index, final)

    def _convolution(self, block: ShortConv, h: str, index: int, final: bool) -> str:
        graph, name = self._graph, block.name
        (bcx,) = self._linears(h, block.into)
        b, c, x = graph.split(bcx, [block.width] * 3, f"{name}.split")
        gated = graph.node("Mul", [b, x], f"{name}.gate_in")
        past, present = self._names.conv(graph, block, index)
        y = self._blocks.short_conv(gated, block.conv.stem, past, present)
        if final:
            y = self._places.wanted(y, f"{name}.last")
            c = self._places.wanted(c, f"{name}.last_gate")
        (out,) = self._linears(graph.node("Mul", [c, y], f"{name}.gate_out"), block.out)
        return out

    def _attention(self, block: Attention, h: str, index: int, final: bool) -> str:
        q, k, v = self._linears(h, block.q, block.k, block.v)
        q = self._head_norm(q, block.q_norm, block.heads, block.head_dim)
        k = self._head_norm(k, block.k_norm, block.kv_heads, block.head_dim)
        past, present = self._names.cache(self._graph, block, index)
        mixed = self._blocks.attention([q, k, v], block.name, past, present)
        mixed = self._places.wanted(mixed, f"{block.name}.last") if final else mixed
        (out,) = self._linears(mixed, block.out)
        return out

    def _head_norm(self, x: str, norm: Norm | None, heads: int, size: int) -> str:
        """Normalise each head's part of the width."""
        if norm is None:
            return x
        graph, name = self._graph, norm.weight.stem
        x = graph.node("Reshape", [x, graph.integers(0, -1, size)], f"{name}.heads")
        x = self._blocks.norm(x, name)
        return graph.node("Reshape", [x, graph.integers(0, -1, heads * size)], f"{name}.width")

    def _gated(self, block: GatedMlp, h: str) -> str:
        graph, name = self._graph, block.name
        gate, up = self._linears(h, block.gate, block.up)
        sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{name}.silu")
        inner = graph.node("Mul", [silu, up], f"{name}.gated")
        (out,) = self._linears(inner, block.down)
        return out

    def _linears(self, x: str, *linears: Linear) -> list[str]:
        """Multiply by each matrix, and add the biases that there are."""
        found = self._blocks.linears(x, [linear.weight.stem for linear in linears])
        return [
            y if linear.bias is None else self._blocks.biased(y, linear.bias.stem)
            for y, linear in zip(found, linears, strict=True)
        ]
