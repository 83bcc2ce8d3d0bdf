"""LFM2 written to be traced: gated short convolutions and grouped-query attention.

Source: LFM2 technical report, arXiv 2511.23404, section 2. The wiring is here once; what a
linear, a norm, the attention with its cache are made of is given by `Blocks`, so that the eager
reference and each exporter share the wiring and differ only in the operators they trace.
"""

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from edgekit.models.config import ModelConfig


class Blocks(Protocol):
    """The operators an LFM2 is built from; tensor names are those of the checkpoint.

    Activations are `[n, width]`: one sequence, `n` tokens, no batch dimension.
    """

    def embedding(self, name: str) -> nn.Module:
        """Token ids int64 `[n]` to hidden states `[n, d]`."""
        ...

    def linear(self, name: str, part: int = 0, parts: int = 1) -> nn.Module:
        """Multiply by the weight, or by the `part`-th of `parts` equal blocks of its rows."""
        ...

    def rms_norm(self, name: str, eps: float) -> nn.Module:
        """Normalise the last dimension by its root mean square, times the weight."""
        ...

    def short_conv(self, name: str, kernel: int) -> nn.Module:
        """Depthwise convolution `[n + kernel - 1, d]` to `[n, d]`."""
        ...

    def attention(self, config: ModelConfig, context: int) -> nn.Module:
        """Causal attention with its KV cache.

        `(q [n, heads, head_dim], k, v [n, kv_heads, head_dim], start)` to
        `[n, heads * head_dim]`.
        """
        ...

    def rope(self, config: ModelConfig, context: int) -> nn.Module:
        """Tables for a run of positions: `(start, n) -> (cos, sin)`, each `[n, 1, head_dim]`."""
        ...

    def rotate(self, head_dim: int) -> nn.Module:
        """`(x1, x2) -> (-x2, x1)` on the two halves of the last dimension."""
        ...


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, blocks: Blocks, prefix: str) -> None:
        super().__init__()
        self.w1 = blocks.linear(f"{prefix}.w1.weight")
        self.w2 = blocks.linear(f"{prefix}.w2.weight")
        self.w3 = blocks.linear(f"{prefix}.w3.weight")

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, d]` to `[n, d]`."""
        return cast(Tensor, self.w2(self.hidden(x)))

    def hidden(self, x: Tensor) -> Tensor:
        """Return what w2 multiplies."""
        gate = self.w1(x)
        return cast(Tensor, gate * torch.sigmoid(gate) * self.w3(x))


class ShortConvolution(nn.Module):
    """Double-gated short convolution: `out_proj(C * conv(B * x))` with `B, C, x = in_proj(h)`.

    The state holds the last `kernel - 1` inputs of the convolution. It is multiplied by zero at
    position 0, so a runner that only rewinds the position starts a new prompt correctly.
    """

    def __init__(self, blocks: Blocks, config: ModelConfig, prefix: str) -> None:
        super().__init__()
        # Three linears instead of one and a split: a split of a dynamic tensor would leave the
        # delegate. The rows, and so the codes, are those of the checkpoint's one matrix.
        name = f"{prefix}.in_proj.weight"
        self.b_proj = blocks.linear(name, 0, 3)
        self.c_proj = blocks.linear(name, 1, 3)
        self.x_proj = blocks.linear(name, 2, 3)
        self.conv = blocks.short_conv(f"{prefix}.conv.weight", config.conv_kernel)
        self.out_proj = blocks.linear(f"{prefix}.out_proj.weight")
        shape = (config.conv_kernel - 1, config.hidden_size)
        self.register_buffer("state", torch.zeros(shape), persistent=False)

    def forward(self, h: Tensor, keep_state: Tensor, only_last: bool) -> Tensor:
        """Map `[n, d]` to `[n, d]`, or to `[1, d]`, the last row, where only it is wanted.

        `keep_state` `[1]` is 0 at position 0 and 1 elsewhere.
        """
        return cast(Tensor, self.out_proj(self.mixed(h, keep_state, only_last)))

    def mixed(self, h: Tensor, keep_state: Tensor, only_last: bool) -> Tensor:
        """Return what out_proj multiplies."""
        state = cast(Tensor, self.state)
        padded = torch.cat([state * keep_state, self.b_proj(h) * self.x_proj(h)])
        state.copy_(padded[-state.shape[0] :])
        if only_last:
            h, padded = h[-1:], padded[-(state.shape[0] + 1) :]
        return cast(Tensor, self.c_proj(h) * self.conv(padded))


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, blocks: Blocks, config: ModelConfig, context: int, prefix: str) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = blocks.linear(f"{prefix}.q_proj.weight")
        self.k_proj = blocks.linear(f"{prefix}.k_proj.weight")
        self.v_proj = blocks.linear(f"{prefix}.v_proj.weight")
        self.out_proj = blocks.linear(f"{prefix}.out_proj.weight")
        self.q_norm = blocks.rms_norm(f"{prefix}.q_layernorm.weight", config.norm_eps)
        self.k_norm = blocks.rms_norm(f"{prefix}.k_layernorm.weight", config.norm_eps)
        self.rotate = blocks.rotate(config.head_dim)
        self.attend = blocks.attention(config, context)

    def forward(self, h: Tensor, start: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Map `[n, d]` to `[n, d]`; keys and values are stored from position `start` on."""
        return cast(Tensor, self.out_proj(self.mixed(h, start, cos, sin)))

    def mixed(self, h: Tensor, start: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what out_proj multiplies."""
        # -1, not n: XNNPACK takes a view whose run-time length is the one it may infer.
        q = self.q_norm(self.q_proj(h).view(-1, self.heads, self.head_dim))
        k = self.k_norm(self.k_proj(h).view(-1, self.kv_heads, self.head_dim))
        v = self.v_proj(h).view(-1, self.kv_heads, self.head_dim)
        q = q * cos + self.rotate(q) * sin
        k = k * cos + self.rotate(k) * sin
        return cast(Tensor, self.attend(q, k, v, start))


class Layer(nn.Module):
    """Pre-norm residual layer: an operator (convolution or attention), then the feed-forward."""

    def __init__(self, blocks: Blocks, config: ModelConfig, context: int, index: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.is_attention = config.layer_types[index] == "full_attention"
        self.operator: Attention | ShortConvolution
        if self.is_attention:
            self.operator = Attention(blocks, config, context, f"{prefix}.self_attn")
        else:
            self.operator = ShortConvolution(blocks, config, f"{prefix}.conv")
        self.feed_forward = FeedForward(blocks, f"{prefix}.feed_forward")
        self.operator_norm = blocks.rms_norm(f"{prefix}.operator_norm.weight", config.norm_eps)
        self.ffn_norm = blocks.rms_norm(f"{prefix}.ffn_norm.weight", config.norm_eps)

    def forward(
        self, x: Tensor, start: int, cos: Tensor, sin: Tensor, keep_state: Tensor, only_last: bool
    ) -> Tensor:
        """Map `[n, d]` to `[n, d]`, or to `[1, d]`, the last row, where only it is wanted."""
        h = self.operator_norm(x)
        if self.is_attention:
            mixed = self.operator(h, start, cos, sin)
            mixed = mixed[-1:] if only_last else mixed
        else:
            mixed = self.operator(h, keep_state, only_last)
        x = (x[-1:] if only_last else x) + mixed
        return cast(Tensor, x + self.feed_forward(self.ffn_norm(x)))


class LFM2(nn.Module):
    """The whole model with its static caches.

    `forward(tokens int64 [1, n], input_pos int64 [1]) -> logits float32 [1, vocab]` of the last
    position. Calling again with the next position continues the sequence (chunked prefill and
    decode); calling with position 0 starts a new one.
    """

    def __init__(self, blocks: Blocks, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.context = context
        self.vocab_size = config.vocab_size
        self.embed_tokens = blocks.embedding("model.embed_tokens.weight")
        self.layers = nn.ModuleList(
            Layer(blocks, config, context, index) for index in range(len(config.layer_types))
        )
        self.norm = blocks.rms_norm("model.embedding_norm.weight", config.norm_eps)
        self.lm_head = blocks.linear("lm_head.weight")
        self.rope = blocks.rope(config, context)

    def _hidden(self, tokens: Tensor, input_pos: Tensor, only_last: bool) -> Tensor:
        """Hidden states before the last norm of tokens `[1, n]`: `[n, d]`, or the last's `[1, d]`.

        Nothing after the last layer looks at the other positions: where only the last is wanted,
        a convolution layer gates and projects that row alone, and an attention layer, last in no
        known LFM2, drops the others at its end.
        """
        n = tokens.shape[1]
        start = cast(int, input_pos[0].item())
        torch._check(start >= 0)
        torch._check(start + n <= self.context)
        cos, sin = self.rope(start, n)
        keep_state = (input_pos > 0).to(torch.float32)
        x = self.embed_tokens(tokens.view(n))
        final = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x, start, cos, sin, keep_state, only_last and index == final)
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
