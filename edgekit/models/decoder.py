"""Any decoder of `architecture.py` as a torch module that is written to be traced.

The wiring is here once; what a linear, a norm, the attention with its cache are made of is given by
`Blocks`, so that the eager reference and each exporter share it and differ only in the operators
they trace.
"""

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from edgekit.models.architecture import (
    Architecture,
    Attention,
    GatedMlp,
    Layer,
    Linear,
    Mixer,
    Norm,
    Parameter,
    ShortConv,
)


class Blocks(Protocol):
    """The operators a decoder is built from; weights are found by their names.

    Activations are `[n, width]`: one sequence, `n` tokens, no batch dimension.
    """

    def embedding(self, table: Parameter) -> nn.Module:
        """Token ids int64 `[n]` to hidden states `[n, d]`."""
        ...

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        """Multiply by the weight, or by the `part`-th of `parts` equal blocks of its rows.

        A bias is added where there is one; such a linear comes whole.
        """
        ...

    def rms_norm(self, norm: Norm) -> nn.Module:
        """Normalise the last dimension by its root mean square, times the weight."""
        ...

    def short_conv(self, block: ShortConv) -> nn.Module:
        """Depthwise convolution `[n + kernel - 1, d]` to `[n, d]`."""
        ...

    def attention(self, block: Attention, context: int) -> nn.Module:
        """Causal attention with its KV cache.

        `(q [n, heads, head_dim], k, v [n, kv_heads, head_dim], start)` to
        `[n, heads * head_dim]`.
        """
        ...

    def rope(self, block: Attention, context: int) -> nn.Module:
        """Tables for a run of positions: `(start, n) -> (cos, sin)`, each `[n, 1, head_dim]`."""
        ...

    def rotate(self, head_dim: int) -> nn.Module:
        """`(x1, x2) -> (-x2, x1)` on the two halves of the last dimension."""
        ...


class Place(NamedTuple):
    """Where a run of tokens stands: what all layers are told of it.

    `cos` and `sin` are the rotation's, `[n, 1, head_dim]`, empty in a model without attention;
    `keep_state` `[1]` is 0 at position 0 and 1 elsewhere.
    """

    start: int
    cos: Tensor
    sin: Tensor
    keep_state: Tensor


class MlpModule(nn.Module):
    """`GatedMlp`: `down(silu(gate x) * up x)`."""

    def __init__(self, blocks: Blocks, block: GatedMlp) -> None:
        super().__init__()
        self.gate = blocks.linear(block.gate)
        self.down = blocks.linear(block.down)
        self.up = blocks.linear(block.up)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, d]` to `[n, d]`."""
        return cast(Tensor, self.down(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """Return what `down` multiplies."""
        gate = self.gate(x)
        return cast(Tensor, gate * torch.sigmoid(gate) * self.up(x))


class ConvModule(nn.Module):
    """`ShortConv`: `out(C * conv(B * x))` with `B, C, x = into(h)`.

    The state holds the last `kernel - 1` inputs of the convolution. It is multiplied by zero at
    position 0, so a runner that only rewinds the position starts a new prompt correctly.
    """

    def __init__(self, blocks: Blocks, block: ShortConv) -> None:
        super().__init__()
        # Three linears instead of one and a split: a split of a dynamic tensor would leave the
        # delegate. The rows, and so the codes, are those of the checkpoint's one matrix.
        self.b_proj = blocks.linear(block.into, 0, 3)
        self.c_proj = blocks.linear(block.into, 1, 3)
        self.x_proj = blocks.linear(block.into, 2, 3)
        self.conv = blocks.short_conv(block)
        self.out = blocks.linear(block.out)
        shape = (block.kernel - 1, block.width)
        self.register_buffer("state", torch.zeros(shape), persistent=False)

    def mixed(self, h: Tensor, place: Place, only_last: bool) -> Tensor:
        """Return what `out` multiplies, `[n, d]`, or `[1, d]` where only the last is wanted."""
        state = cast(Tensor, self.state)
        padded = torch.cat([state * place.keep_state, self.b_proj(h) * self.x_proj(h)])
        state.copy_(padded[-state.shape[0] :])
        if only_last:
            h, padded = h[-1:], padded[-(state.shape[0] + 1) :]
        return cast(Tensor, self.c_proj(h) * self.conv(padded))


class AttentionModule(nn.Module):
    """`Attention`; keys and values are stored from the run's first position on."""

    def __init__(self, blocks: Blocks, block: Attention, context: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = block.heads, block.kv_heads, block.head_dim
        self.q = blocks.linear(block.q)
        self.k = blocks.linear(block.k)
        self.v = blocks.linear(block.v)
        self.out = blocks.linear(block.out)
        self.q_norm = nn.Identity() if block.q_norm is None else blocks.rms_norm(block.q_norm)
        self.k_norm = nn.Identity() if block.k_norm is None else blocks.rms_norm(block.k_norm)
        self.rotate = blocks.rotate(block.head_dim)
        self.attend = blocks.attention(block, context)

    def mixed(self, h: Tensor, place: Place, only_last: bool) -> Tensor:
        """Return what `out` multiplies, `[n, d]`, or `[1, d]` where only the last is wanted."""
        # -1, not n: XNNPACK takes a view whose run-time length is the one it may infer.
        q = self.q_norm(self.q(h).view(-1, self.heads, self.head_dim))
        k = self.k_norm(self.k(h).view(-1, self.kv_heads, self.head_dim))
        v = self.v(h).view(-1, self.kv_heads, self.head_dim)
        q = q * place.cos + self.rotate(q) * place.sin
        k = k * place.cos + self.rotate(k) * place.sin
        mixed = cast(Tensor, self.attend(q, k, v, place.start))
        return mixed[-1:] if only_last else mixed


class LayerModule(nn.Module):
    """Pre-norm residual layer: what mixes positions, then what mixes channels."""

    def __init__(self, blocks: Blocks, layer: Layer, context: int) -> None:
        super().__init__()
        self.mixer = _mixer(blocks, layer.mixer, context)
        self.mlp = MlpModule(blocks, layer.mlp)
        self.mixer_norm = blocks.rms_norm(layer.mixer_norm)
        self.mlp_norm = blocks.rms_norm(layer.mlp_norm)

    def forward(self, x: Tensor, place: Place, only_last: bool = False) -> Tensor:
        """Map `[n, d]` to `[n, d]`, or to `[1, d]`, the last row, where only it is wanted."""
        mixed = self.mixer.out(self.mixer.mixed(self.mixer_norm(x), place, only_last))
        x = (x[-1:] if only_last else x) + mixed
        return cast(Tensor, x + self.mlp(self.mlp_norm(x)))


def _mixer(blocks: Blocks, block: Mixer, context: int) -> AttentionModule | ConvModule:
    if isinstance(block, Attention):
        return AttentionModule(blocks, block, context)
    return ConvModule(blocks, block)


class Decoder(nn.Module):
    """The whole model with its static caches.

    `forward(tokens int64 [1, n], input_pos int64 [1]) -> logits float32 [1, vocab]` of the last
    position. Calling again with the next position continues the sequence (chunked prefill and
    decode); calling with position 0 starts a new one.
    """

    def __init__(self, blocks: Blocks, architecture: Architecture, context: int) -> None:
        super().__init__()
        self.context = context
        self.vocab_size = architecture.embedding.shape[0]
        self.embed_tokens = blocks.embedding(architecture.embedding)
        self.layers = nn.ModuleList(
            LayerModule(blocks, layer, context) for layer in architecture.layers
        )
        self.norm = blocks.rms_norm(architecture.norm)
        self.lm_head = blocks.linear(architecture.head)
        # All layers rotate alike (`Architecture` sees to it), so their tables are here once.
        attention = next(iter(architecture.attentions()), None)
        self.rope = None if attention is None else blocks.rope(attention, context)

    def place(self, input_pos: Tensor, n: int) -> Place:
        """Return where `n` tokens stand of which the first is at `input_pos`, int64 `[1]`."""
        start = cast(int, input_pos[0].item())
        torch._check(start >= 0)
        torch._check(start + n <= self.context)
        cos, sin = (torch.empty(0),) * 2 if self.rope is None else self.rope(start, n)
        return Place(start, cos, sin, (input_pos > 0).to(torch.float32))

    def _hidden(self, tokens: Tensor, input_pos: Tensor, only_last: bool) -> Tensor:
        """Hidden states before the last norm of tokens `[1, n]`: `[n, d]`, or the last's `[1, d]`.

        Nothing after the last layer looks at the other positions: where only the last is wanted,
        that layer's mixer passes on that row alone.
        """
        n = tokens.shape[1]
        place = self.place(input_pos, n)
        x = self.embed_tokens(tokens.view(n))
        final = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, place, only_last and index == final)
        return cast(Tensor, x)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits `[1, vocab]` of the last of the tokens `[1, n]` at `input_pos` `[1]`."""
        return cast(
            Tensor, self.lm_head(self.norm(self._hidden(tokens, input_pos, only_last=True)))
        )

    def all_logits(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits `[n, vocab]` of every position, for evaluation."""
        return cast(
            Tensor, self.lm_head(self.norm(self._hidden(tokens, input_pos, only_last=False)))
        )
