"""How engines round the inputs of a quantized linear to int8 at run time, as functions of torch.

What an engine computes can be told from what it should only where its rounding is known: two ways
of rounding differ by as much as quantization itself where a model amplifies small differences.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit.quantize.tensor import QuantizedTensor

FakeQuantize = Callable[[Tensor, QuantizedTensor], Tensor]
"""From a linear's inputs `[n, columns]` and its weight to the inputs that are multiplied."""


def unrounded(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Leave activations as they are, to see what the weights alone cost."""
    return x


def per_token(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round each token's inputs on a range of their own (XNNPACK's `qd8`).

    Asymmetric, with a range that contains 0 (arXiv 1806.08342, section 2.1):
    `scale = (max - min) / 255`, `zero = round(-128 - min / scale)`.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-128 - low / scale).round()
    codes = ((x / scale).round() + zero).clamp(-128, 127)
    return (codes - zero) * scale


def per_block(x: Tensor, size: int, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Round each run of `size` inputs symmetrically: `scale = max |x| / 127`.

    The scale is stored, and multiplied by, in `scale_dtype`.
    """
    blocks = x.unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, 0.0)  # as ggml and MLAS: not a division each
    codes = (blocks * inverse).round()
    rounded: Tensor = codes * scale.to(scale_dtype).float()
    return rounded.flatten(-2)


NEAR = 2.0**-20
"""How far, relative to a value, engines part before they round it.

Their float32 sums have another order, and exponentials and roots are off by some units in the last
place. How much is of little weight: what falls the other way anywhere moves all that comes after.
"""


def otherwise(fake_quantize: FakeQuantize, seed: int = 0) -> FakeQuantize:
    """Round as an engine that sums in another order: what lies near a tie may go either way."""
    generator = torch.Generator().manual_seed(seed)

    def rounded(x: Tensor, weight: QuantizedTensor) -> Tensor:
        return fake_quantize(x * (1 + NEAR * torch.randn(x.shape, generator=generator)), weight)

    return rounded
