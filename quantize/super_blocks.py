"""Scales of two levels, for 6-bit codes: a whole multiple, 1 to 127, of a step in float16.

A super-block of 256 columns has one step for the scales of its 16 groups, as ggml's Q6_K has it
(ggml/src/ggml-common.h, `block_q6_K`): 18 bytes for 16 scales where bfloat16 takes 32. The largest
scale of each super-block is 127 steps, so the scales alone say what the step is. ggml's own
quantizer also makes negative multiples; here scales are positive.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekit.quantize.schemes.super_blocks import COLUMNS, GROUPS

LARGEST = 127
SMALLEST_STEP = 2.0**-24
"""The smallest float16 there is; steps may be subnormal, as in ggml."""
LARGEST_STEP = 65504.0
_SHIFTS = (-3, -2, -1, 1, 2, 3)


def split(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return steps `[..., groups / 16]` (float16) and multiples (uint8, as `scales`).

    ValueError where the scales are not exactly such products.
    """
    blocks = _blocks(scales)
    steps = _steps(blocks)
    multiples = (blocks / steps).round()
    if not torch.equal(multiples * steps, blocks) or int(multiples.min()) < 1:
        raise ValueError(
            f"6-bit scales must be 1 to {LARGEST} times a float16 for each {COLUMNS} columns, the "
            f"largest {LARGEST} times"
        )
    of_blocks = (*scales.shape[:-1], scales.shape[-1] // GROUPS)
    return steps.to(torch.float16).reshape(of_blocks), multiples.to(torch.uint8).view(scales.shape)


def join(steps: Tensor, multiples: Tensor) -> Tensor:
    """Undo `split`: return the scales, float32."""
    spread = steps.to(torch.float32).repeat_interleave(GROUPS, dim=-1)
    return spread * multiples.to(torch.float32)


def covering(scales: Tensor) -> Tensor:
    """Return scales `[ranges]` of two levels that are no smaller, but for the step's rounding."""
    blocks = _blocks(scales)
    steps = _steps(blocks)
    return (_multiples((blocks / steps).ceil(), blocks) * steps).view(-1)


def nearest(scales: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Return scales `[..., ranges]` of two levels near the given ones, each of the least `error`.

    `error` gives each range's from such scales. The largest of a super-block sets the step.
    """
    blocks = _blocks(scales)
    steps = _steps(blocks)
    start = best = _multiples((blocks / steps).round(), blocks)
    least = error((best * steps).view_as(scales)).view_as(blocks)
    for shift in _SHIFTS:
        moved = _multiples(start + shift, blocks)
        found = error((moved * steps).view_as(scales)).view_as(blocks)
        best = torch.where(found < least, moved, best)
        least = torch.minimum(found, least)
    return (best * steps).view_as(scales)


def _blocks(scales: Tensor) -> Tensor:
    if scales.shape[-1] % GROUPS:
        raise ValueError(f"6-bit scales come in runs of {GROUPS}, got {scales.shape[-1]}")
    return scales.reshape(-1, GROUPS)


def _steps(blocks: Tensor) -> Tensor:
    """Return the step of each super-block `[blocks, 1]`, float32 and exact in float16."""
    steps = (blocks.amax(1, keepdim=True) / LARGEST).clamp(max=LARGEST_STEP)
    return steps.to(torch.float16).to(torch.float32).clamp(min=SMALLEST_STEP)


def _multiples(values: Tensor, blocks: Tensor) -> Tensor:
    """Return whole numbers in range; the largest scale of a super-block is the largest of them."""
    is_largest = blocks == blocks.amax(1, keepdim=True)
    return values.clamp(1, LARGEST).masked_fill(is_largest, LARGEST)
