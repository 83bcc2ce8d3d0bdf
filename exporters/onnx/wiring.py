"""The wiring of an LFM2 in ONNX: the same layers as `edgekit.models.lfm2`, written as nodes.

Built directly, not traced: the graph is small, and this way each node, name and state is the one
that the run times expect. What a linear, a norm or the attention is made of is given by `Blocks`.
Activations are `[batch, tokens, width]`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from onnx import TensorProto

from edgekit.exporters.onnx.graph import OnnxGraph
from edgekit.exporters.onnx.padding import Places
from edgekit.exporters.onnx.states import Names
from edgekit.models.config import ModelConfig

ROWS = "num_logits_to_keep"


class Blocks(Protocol):
    """The operators that an LFM2 is built from; `name` is a layer's, as in the checkpoint."""

    def begin(self, mask: str, places: Places) -> None:
        """Compute what all layers share; `mask` is `[batch, so far and new]`."""
        ...

    def embedding(self, tokens: str, name: str) -> str:
        """Token ids int64 `[batch, tokens]` to hidden states."""
        ...

    def linears(self, x: str, names: Sequence[str]) -> list[str]:
        """Multiply by each of some matrices."""
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
        """Rotate, append to the caches of keys and values, attend; q and k are normalised."""
        ...


def build(graph: OnnxGraph, blocks: Blocks, config: ModelConfig, names: Names) -> None:
    """Write the whole model.

    It computes the logits of the last `num_logits_to_keep` tokens, 0 for all; nothing after the
    last layer's mixing of positions looks at the others.
    """
    tokens = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    rows = graph.input(ROWS, TensorProto.INT64, [])
    if names.default_rows is not None:
        graph.small(ROWS, np.array(names.default_rows, np.int64))
    graph.output("logits", TensorProto.FLOAT, ["batch_size", names.logits_rows, config.vocab_size])
    places = Places(graph, tokens, mask, rows)
    blocks.begin(mask, places)
    _Model(graph, blocks, config, names, places).write()


class _Model:
    def __init__(
        self, graph: OnnxGraph, blocks: Blocks, config: ModelConfig, names: Names, places: Places
    ) -> None:
        self._graph, self._blocks, self._config, self._names = graph, blocks, config, names
        self._places = places

    def write(self) -> None:
        config, blocks = self._config, self._blocks
        layers = [f"model.layers.{i}" for i in range(config.num_layers)]
        norms = [*(f"{layer}.operator_norm" for layer in layers[1:]), "model.embedding_norm"]
        x = blocks.embedding(self._places.tokens, "model.embed_tokens")
        h = blocks.norm(x, f"{layers[0]}.operator_norm")
        for index, (layer, kind) in enumerate(zip(layers, config.layer_types, strict=True)):
            final = index == config.num_layers - 1
            mix = self._attention if kind == "full_attention" else self._convolution
            mixed = mix(h, layer, index, final)
            x = self._places.wanted(x, f"{layer}.residual") if final else x
            h, x = blocks.add_norm(x, mixed, f"{layer}.ffn_norm")
            h, x = blocks.add_norm(x, self._feed_forward(h, f"{layer}.feed_forward"), norms[index])
        (logits,) = blocks.linears(h, ["lm_head"])
        self._graph.node("Identity", [logits], "logits")

    def _convolution(self, h: str, layer: str, index: int, final: bool) -> str:
        graph, name, width = self._graph, f"{layer}.conv", self._config.hidden_size
        (bcx,) = self._blocks.linears(h, [f"{name}.in_proj"])
        b, c, x = graph.split(bcx, [width] * 3, f"{name}.split")
        gated = graph.node("Mul", [b, x], f"{name}.gate_in")
        past, present = self._names.conv(graph, self._config, index)
        y = self._blocks.short_conv(gated, f"{name}.conv", past, present)
        if final:
            y = self._places.wanted(y, f"{name}.last")
            c = self._places.wanted(c, f"{name}.last_gate")
        (out,) = self._blocks.linears(
            graph.node("Mul", [c, y], f"{name}.gate_out"), [f"{name}.out_proj"]
        )
        return out

    def _attention(self, h: str, layer: str, index: int, final: bool) -> str:
        name = f"{layer}.self_attn"
        q, k, v = self._blocks.linears(h, [f"{name}.{part}_proj" for part in "qkv"])
        q = self._head_norm(q, f"{name}.q_layernorm", self._config.num_heads)
        k = self._head_norm(k, f"{name}.k_layernorm", self._config.num_kv_heads)
        past, present = self._names.cache(self._graph, self._config, index)
        mixed = self._blocks.attention([q, k, v], name, past, present)
        mixed = self._places.wanted(mixed, f"{name}.last") if final else mixed
        (out,) = self._blocks.linears(mixed, [f"{name}.out_proj"])
        return out

    def _head_norm(self, x: str, name: str, heads: int) -> str:
        """Normalise each head's part of the width."""
        graph, size = self._graph, self._config.head_dim
        x = graph.node("Reshape", [x, graph.integers(0, -1, size)], f"{name}.heads")
        x = self._blocks.norm(x, name)
        return graph.node("Reshape", [x, graph.integers(0, -1, heads * size)], f"{name}.width")

    def _feed_forward(self, h: str, name: str) -> str:
        graph = self._graph
        gate, up = self._blocks.linears(h, [f"{name}.w1", f"{name}.w3"])
        sigmoid = graph.node("Sigmoid", [gate], f"{name}.sigmoid")
        silu = graph.node("Mul", [gate, sigmoid], f"{name}.silu")
        inner = graph.node("Mul", [silu, up], f"{name}.gated")
        (out,) = self._blocks.linears(inner, [f"{name}.w2"])
        return out
