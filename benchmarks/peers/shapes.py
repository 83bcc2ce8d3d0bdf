"""The two LFM2 shapes the peers are built at, and random weights for them.

Kept apart from edgekit on purpose: a peer must not depend on the code it is compared with.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

VOCAB = 65_536
LAYERS = 16
ATTENTION_LAYERS = (2, 5, 8, 10, 12, 14)
KV_HEADS = 8
HEAD_DIM = 64
CONV_KERNEL = 3
NORM_EPS = 1e-5
ROPE_THETA = 1e6
TRAINED_CONTEXT = 128_000
BOS, EOS, PAD = 1, 7, 0


@dataclass(frozen=True)
class Shape:
    """One size of LFM2; what is not here is common to both."""

    name: str
    hidden: int
    feed_forward: int
    heads: int
    layers: int = LAYERS

    @property
    def layer_types(self) -> list[str]:
        return ["full_attention" if i in ATTENTION_LAYERS else "conv" for i in range(self.layers)]

    @property
    def embedding_values(self) -> int:
        return VOCAB * self.hidden

    @property
    def bf16_bytes(self) -> int:
        """The size of the released checkpoint's tensors."""
        return 2 * sum(prod(size) for _, size in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the checkpoint's tensors (Hugging Face names) with their shapes, head tied."""
        d, ff, kv = self.hidden, self.feed_forward, KV_HEADS * HEAD_DIM
        yield "model.embed_tokens.weight", (VOCAB, d)
        for i, kind in enumerate(self.layer_types):
            layer = f"model.layers.{i}"
            yield f"{layer}.operator_norm.weight", (d,)
            if kind == "conv":
                yield f"{layer}.conv.in_proj.weight", (3 * d, d)
                yield f"{layer}.conv.conv.weight", (d, 1, CONV_KERNEL)
                yield f"{layer}.conv.out_proj.weight", (d, d)
            else:
                yield f"{layer}.self_attn.q_proj.weight", (d, d)
                yield f"{layer}.self_attn.k_proj.weight", (kv, d)
                yield f"{layer}.self_attn.v_proj.weight", (kv, d)
                yield f"{layer}.self_attn.out_proj.weight", (d, d)
                yield f"{layer}.self_attn.q_layernorm.weight", (HEAD_DIM,)
                yield f"{layer}.self_attn.k_layernorm.weight", (HEAD_DIM,)
            yield f"{layer}.ffn_norm.weight", (d,)
            yield f"{layer}.feed_forward.w1.weight", (ff, d)
            yield f"{layer}.feed_forward.w3.weight", (ff, d)
            yield f"{layer}.feed_forward.w2.weight", (d, ff)
        yield "model.embedding_norm.weight", (d,)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("lfm2-350m", hidden=1024, feed_forward=4608, heads=16),
        Shape("lfm2-1.2b", hidden=2048, feed_forward=8192, heads=32),
    )
}


def random_weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the tensor's values: ones for a norm, else normal with a small deviation.

    The seed comes from the name, so every peer file of a shape is made of the same numbers.
    """
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return random.standard_normal(shape, np.float32) * np.float32(0.02)
