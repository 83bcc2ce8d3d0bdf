"""The eager reference: a decoder of plain torch operators, float or quantized.

It defines what an export must compute. Weights are read when they are used and forgotten after,
so a model that is larger than memory in float32 runs through here one matrix at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgekit.models.activations import FakeQuantize, per_token
from edgekit.models.architecture import Attention, Linear, Norm, Parameter, ShortConv
from edgekit.models.checkpoint import WeightSource
from edgekit.models.config import ModelConfig
from edgekit.models.decoder import Decoder
from edgekit.models.rope import rope_tables
from edgekit.models.weights import ReadWeight, floats, row_block
from edgekit.quantize.tensor import QuantizedTensor


def build_eager(
    config: ModelConfig,
    read: ReadWeight,
    context: int,
    fake_quantize: FakeQuantize = per_token,
) -> Decoder:
    """Return the reference model for up to `context` positions, its weights read by `read`.

    `fake_quantize` rounds the inputs of linears whose weight is quantized.
    """
    return Decoder(EagerBlocks(read, fake_quantize), config.architecture, context).eval()


def float_reader(config: ModelConfig, source: WeightSource) -> Callable[[str], Tensor]:
    """Return a reader of the checkpoint's own values, in which a tied head is the embedding."""

    def read(name: str) -> Tensor:
        return source.tensor(ties.get(name, name))

    ties = config.architecture.ties()
    return read


def grouped_query_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attend from `query [n, heads, head_dim]` to `keys`, `values` `[end, kv_heads, head_dim]`.

    `mask` `[n, end]` is True where a query sees a key. Returns `[n, heads * head_dim]`.
    """
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, keys, values))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return mixed[0].transpose(0, 1).reshape(query.shape[0], -1)


class EagerBlocks:
    """`edgekit.models.decoder.Blocks` in plain torch operators."""

    def __init__(self, read: ReadWeight, fake_quantize: FakeQuantize = per_token) -> None:
        self._read, self._fake_quantize = read, fake_quantize

    def embedding(self, table: Parameter) -> nn.Module:
        """Rows of the table."""
        return _Embedding(self._read, table.name)

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        """Multiply by the dequantized weight; inputs are rounded where the weight is quantized."""
        return _Linear(self._read, linear, part, parts, self._fake_quantize)

    def rms_norm(self, norm: Norm) -> nn.Module:
        """RMSNorm in float32."""
        return _RmsNorm(floats(self._read(norm.weight.name)), norm.eps)

    def short_conv(self, block: ShortConv) -> nn.Module:
        """Depthwise `conv1d` after the state."""
        return _ShortConv(floats(self._read(block.conv.name)))

    def attention(self, block: Attention, context: int) -> nn.Module:
        """`scaled_dot_product_attention` over a static cache."""
        return _Attention(block, context)

    def rope(self, block: Attention, context: int) -> nn.Module:
        """Slices of precomputed tables."""
        return _Rope(block, context)

    def rotate(self, head_dim: int) -> nn.Module:
        """Swap the halves."""
        return _Rotate()


class _Embedding(nn.Module):
    def __init__(self, read: ReadWeight, name: str) -> None:
        super().__init__()
        self._read, self._name = read, name

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self._read(self._name)
        if isinstance(weight, Tensor):
            return weight[tokens].float()
        # Only the rows that are used are dequantized; a row has its own scales.
        return weight.rows(tokens).dequantize()


class _Linear(nn.Module):
    def __init__(
        self, read: ReadWeight, linear: Linear, part: int, parts: int, fake_quantize: FakeQuantize
    ) -> None:
        super().__init__()
        self._read, self._linear, self._part, self._parts = read, linear, part, parts
        self._fake_quantize = fake_quantize

    def forward(self, x: Tensor) -> Tensor:
        weight = row_block(self._read(self._linear.weight.name), self._part, self._parts)
        if isinstance(weight, QuantizedTensor):
            x = self._fake_quantize(x, weight)
        y = _matmul(x, weight)
        bias = self._linear.bias
        return y if bias is None else y + floats(self._read(bias.name))


def _matmul(x: Tensor, weight: QuantizedTensor | Tensor) -> Tensor:
    """Return `x @ weight.T`, with at most some 64 MB of the weight in float32 at a time."""
    parts = max(1, weight.shape[0] * weight.shape[1] // (1 << 24))
    while weight.shape[0] % parts:
        parts += 1
    blocks = (floats(row_block(weight, part, parts)) for part in range(parts))
    return torch.cat([nn.functional.linear(x, block) for block in blocks], dim=-1)


class _RmsNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._weight, self._eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * self._weight


class _ShortConv(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight

    def forward(self, padded: Tensor) -> Tensor:
        return nn.functional.conv1d(padded.t()[None], self._weight, groups=padded.shape[1])[0].t()


class _Attention(nn.Module):
    keys: Tensor
    values: Tensor

    def __init__(self, block: Attention, context: int) -> None:
        super().__init__()
        shape = (context, block.kv_heads, block.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        end = start + q.shape[0]
        self.keys[start:end] = k
        self.values[start:end] = v
        positions = torch.arange(start, end)
        mask = torch.arange(end)[None, :] <= positions[:, None]
        return grouped_query_attention(q, self.keys[:end], self.values[:end], mask)


class _Rope(nn.Module):
    def __init__(self, block: Attention, context: int) -> None:
        super().__init__()
        self._cos, self._sin = rope_tables(block.rope, block.head_dim, context)

    def forward(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        return self._cos[start : start + n], self._sin[start : start + n]


class _Rotate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
