"""What a decoder is made of when it is traced for ExecuTorch with the XNNPACK delegate.

Every operator here is one that XNNPACK takes as it stands, so that the lowering has nothing to
decompose: each pass it does not run over some thousand nodes with symbolic shapes saves seconds.
"""

from typing import cast

import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401  registers embedding_*
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers llama::*
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers quantized_decomposed::*

from edgekit.exporters.executorch import ops as xnnpack_ops
from edgekit.models.architecture import Attention, Linear, Norm, Parameter, ShortConv
from edgekit.models.rope import rope_tables
from edgekit.models.weights import ReadWeight, floats, row_block
from edgekit.quantize.tensor import QuantizedTensor

_decomposed_ops = torch.ops.quantized_decomposed
_llama_ops = torch.ops.llama


PREFILL_CHUNK = 512
"""Longest run of tokens that attends in XNNPACK: 134 MB for each copy of the
scores at 32 heads and 2,048 positions.

`llama.cpp` computes prompts in pieces of the same length (its `n_ubatch`).
"""


class XnnpackBlocks:
    """`edgekit.models.decoder.Blocks` in ExecuTorch's operators; codes become constants verbatim.

    `read` returns a tensor's codes or floats; nothing is quantized or dequantized here.
    """

    def __init__(self, read: ReadWeight) -> None:
        """Take weights from `read` by name."""
        self._read = read
        self._activation = _DynamicActivation()
        self._positions: _Positions | None = None

    def embedding(self, table: Parameter) -> nn.Module:
        """Gather rows of the codes: the table is never expanded to float."""
        weight = self._read(table.name)
        if isinstance(weight, Tensor):
            return _FloatEmbedding(weight)
        return _ByteEmbedding(weight) if weight.bits == 8 else _NibbleEmbedding(weight)

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        """Multiply dynamically quantized activations by the codes, or floats by floats."""
        weight = row_block(self._read(linear.weight.name), part, parts)
        module: nn.Module
        if isinstance(weight, Tensor):
            module = _FloatLinear(weight)
        else:
            module = _CodesLinear(weight, self._activation)
        if linear.bias is None:
            return module
        return _Biased(module, floats(self._read(linear.bias.name)))

    def rms_norm(self, norm: Norm) -> nn.Module:
        """RMSNorm whose mean is a linear layer with one row of 1/d: XNNPACK takes no such mean."""
        return _RmsNorm(floats(self._read(norm.weight.name)), norm.eps)

    def short_conv(self, block: ShortConv) -> nn.Module:
        """A depthwise convolution over the state and the inputs."""
        return _ShortConv(floats(self._read(block.conv.name)), block.kernel)

    def attention(self, block: Attention, context: int) -> nn.Module:
        """`causal_attention` on a cache that `llama::update_cache` fills."""
        if self._positions is None:
            self._positions = _Positions(context, block.heads // block.kv_heads)
        return _Attention(block, context, self._positions)

    def rope(self, block: Attention, context: int) -> nn.Module:
        """Rows of precomputed tables."""
        return _Rope(block, context)

    def rotate(self, head_dim: int) -> nn.Module:
        """Multiply by a signed permutation: exact, and unlike slices inside the delegate."""
        return _Rotate(head_dim)


class _DynamicActivation:
    """Asymmetric int8 quantization of each token's activations, at run time.

    The chain of one tensor is traced once however many linears read it: XNNPACK then converts it
    once. Tracing calls the linears of one input one after the other, so the last is enough.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            scales, zeros = _decomposed_ops.choose_qparams_per_token_asymmetric.default(
                x, torch.int8
            )
            codes = _decomposed_ops.quantize_per_token.default(
                x, scales, zeros, -128, 127, torch.int8
            )
            self._last = (
                x,
                _decomposed_ops.dequantize_per_token.default(
                    codes, scales, zeros, -128, 127, torch.int8, torch.float32
                ),
            )
        return self._last[1]


class _CodesLinear(nn.Module):
    """Codes and scales as constants behind the dequantize operator that XNNPACK folds."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, weight: QuantizedTensor, activation: _DynamicActivation) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self._activation = activation
        self.register_buffer("codes", _own(weight.codes))
        self.register_buffer("scales", _own(weight.scales))
        # XNNPACK's pattern wants zero points; one byte each is the least they can cost.
        self.register_buffer("zeros", torch.zeros_like(weight.scales, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        low, high = (-8, 7) if self.bits == 4 else (-127, 127)
        if self.group_size is None:
            weight = _decomposed_ops.dequantize_per_channel.default(
                self.codes, self.scales, self.zeros, 0, low, high, torch.int8
            )
        else:
            weight = _decomposed_ops.dequantize_per_channel_group.default(
                self.codes,
                self.scales,
                self.zeros,
                low,
                high,
                torch.int8,
                self.group_size,
                torch.float32,
            )
        return nn.functional.linear(self._activation(x), weight)


def _own(tensor: Tensor) -> Tensor:
    """XNNPACK's serializer writes a tensor's whole storage: a block of rows needs its own."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _FloatLinear(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", _own(weight.float()))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class _Biased(nn.Module):
    """A linear and an addition: the bias stays a float vector, as the norms' weights are."""

    bias: Tensor

    def __init__(self, linear: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x) + self.bias)


class _FloatEmbedding(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class _ByteEmbedding(nn.Module):
    """int8 rows with one scale per row or per group of columns."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = _decomposed_ops.embedding_byte.default(
            self.codes, self.scales, None, -128, 127, tokens
        )
        return rows


class _NibbleEmbedding(nn.Module):
    """int4 rows, two codes a byte: the first in the high half, each plus 8."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        shifted = (weight.codes + 8).to(torch.uint8)
        self.register_buffer("codes", shifted[:, ::2] << 4 | shifted[:, 1::2])
        self.register_buffer("scales", weight.scales)

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = _decomposed_ops.embedding_4bit.default(
            self.codes, self.scales, None, -8, 7, tokens
        )
        return rows


class _RmsNorm(nn.Module):
    weight: Tensor
    mean: Tensor
    eps: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        width = weight.numel()
        self.register_buffer("weight", weight)
        self.register_buffer("mean", torch.full((1, width), 1 / width))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = nn.functional.linear(x * x, self.mean, self.eps)
        return x * torch.rsqrt(mean_square) * self.weight


class _ShortConv(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor, kernel: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight.reshape(-1, kernel).t().contiguous()[None, :, None])

    def forward(self, padded: Tensor) -> Tensor:
        return cast(Tensor, xnnpack_ops.depthwise_conv(padded, self.weight))


class _Positions(nn.Module):
    """Where a run of tokens stands, as its attention wants to know it.

    Traced once however many layers attend: tracing runs them with the same symbolic `start`.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, context: int, group: int) -> None:
        super().__init__()
        positions = torch.arange(context, dtype=torch.float32)
        self.register_buffer("rows", positions[:, None].repeat(1, group))
        self.register_buffer("columns", positions[None].clone())
        self._traced: tuple[object, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def forward(self, start: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return whether to attend in XNNPACK, start and end, the queries' positions.

        bool `[1]`, int64 `[1]` and `[1]`, float32 `[n, group]`.
        """
        if self._traced is not None and self._traced[0] is start:
            return self._traced[1]
        at, length = (torch.full((1,), number, dtype=torch.long) for number in (start, n))
        in_xnnpack = torch.logical_and(length > 1, length <= PREFILL_CHUNK)
        result = in_xnnpack, at, at + n, self.rows[:n] + at
        # Eagerly, equal small numbers are one object too, and `n` may differ.
        if isinstance(start, torch.SymInt):
            self._traced = start, result
        return result


class _Attention(nn.Module):
    """Attention in XNNPACK for a chunk of a prompt, `llama::custom_sdpa` for all else.

    XNNPACK multiplies matrices several times faster, but copies the cache for it, which one token
    does not repay, and holds all scores at once: `heads * n * end` numbers.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, block: Attention, context: int, positions: _Positions) -> None:
        super().__init__()
        shape = (1, context, block.kv_heads, block.head_dim)
        self.register_buffer("keys", torch.zeros(shape), persistent=False)
        self.register_buffer("values", torch.zeros(shape), persistent=False)
        self.positions = positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        in_xnnpack, at, end, rows = self.positions(start, q.shape[0])
        _llama_ops.update_cache(k.unsqueeze(0), self.keys, start)
        _llama_ops.update_cache(v.unsqueeze(0), self.values, start)
        # A branch takes tensors only, and none whose shape hangs on the position.
        operands = (q, self.keys, self.values, at, end, rows, self.positions.columns)
        mixed: Tensor = torch.cond(in_xnnpack, _attend_in_xnnpack, _attend_streaming, operands)
        return mixed


def _attend_in_xnnpack(
    q: Tensor, keys: Tensor, values: Tensor, at: Tensor, end: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    length = cast(int, end.item())
    torch._check(length >= 1)
    torch._check(length <= keys.shape[1])
    keys, values, columns = keys[:, :length], values[:, :length], columns[:, :length]
    return cast(Tensor, xnnpack_ops.causal_attention(q, keys, values, rows, columns))


def _attend_streaming(
    q: Tensor, keys: Tensor, values: Tensor, at: Tensor, end: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    start = cast(int, at.item())
    torch._check(start >= 0)
    mixed = _llama_ops.custom_sdpa(q.unsqueeze(0), keys, values, start, None, 0.0, True)
    return cast(Tensor, mixed.view(-1, q.shape[1] * q.shape[2]))


class _Rope(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, block: Attention, context: int) -> None:
        super().__init__()
        cos, sin = rope_tables(block.rope, block.head_dim, context)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        return self.cos.narrow(0, start, n), self.sin.narrow(0, start, n)


class _Rotate(nn.Module):
    matrix: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        half = torch.eye(head_dim // 2)
        nothing = torch.zeros_like(half)
        rows = (torch.cat([nothing, -half], 1), torch.cat([half, nothing], 1))
        self.register_buffer("matrix", torch.cat(rows))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix)
