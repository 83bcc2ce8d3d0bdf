"""The scales that every target holds exactly: bfloat16 values that are normal in float16.

XNNPACK's 4-bit kernels store bfloat16, GGUF float16 and ONNX float32. A bfloat16 value has 8
significant bits and float16 has 11, so it is exact in all three where float16 is normal.

GGUF's Q4_1 stores the product of scale and zero point as a float16, too. A zero point of 4 bits
leaves the scale 7 of the 11, and 65504 for 15 times the scale.

Scales of 6-bit codes are of another kind (`edgekit.quantize.super_blocks`); what is here for them
are the candidates of a search.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.quantize import super_blocks

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16; below it float16 loses bits."""
LARGEST_SCALE = 65280.0
"""The largest bfloat16 that float16 (at most 65504) holds."""

_FLOAT32_BITS = 24


@dataclass(frozen=True)
class ScaleGrid:
    """Storable scales: so many significant bits, at most `largest`, at least `smallest`."""

    significant_bits: int
    largest: float
    smallest: float = SMALLEST_SCALE

    def round(self, scales: Tensor, up: bool = False) -> Tensor:
        """Round positive float32 scales to the grid: to nearest (ties to even), or up.

        To nearest moves a scale of 8 bits by at most 1 part in 256. A symmetric grid has at most
        128 steps on one side, so an element that lay at its end moves by at most half a step and
        is never clipped by more than rounding costs anyway; an affine grid is twice as long and
        needs `up`.
        Below the smallest the result is that (an all-zero range is scale 0 here: any scale serves).
        Raises ValueError where a scale exceeds the largest or is not a number.
        """
        dropped = _FLOAT32_BITS - self.significant_bits
        # The bit patterns of positive floats are ordered: a carry gives the next larger value.
        pattern = scales.contiguous().view(torch.int32)
        rest = (1 << dropped) - 1
        half = rest if up else (rest >> 1) + (pattern >> dropped & 1)
        rounded = (pattern + half & ~rest).view(torch.float32)
        result = torch.where(scales.isnan(), scales, rounded).clamp(min=self.smallest)
        # Written so that NaN, which compares false, is refused as well.
        if not bool((result <= self.largest).all()):
            raise ValueError(
                f"values up to {float(scales.max()) / self.largest:.3g} times the largest that "
                f"can be stored: scales end at {self.largest:.0f}"
            )
        return result


SCALES = ScaleGrid(8, LARGEST_SCALE)
"""For every grid but those below."""
SCALES_OF_Q4_1 = ScaleGrid(7, 4352.0)
"""For the affine grid of 4 bits; 4352 is the largest of 7 bits that fits 15 times in a float16."""
CANDIDATES_OF_Q6_K = ScaleGrid(
    _FLOAT32_BITS - 1,
    super_blocks.LARGEST * super_blocks.LARGEST_STEP,
    super_blocks.LARGEST * super_blocks.SMALLEST_STEP,
)
"""For the grid of 6 bits, before all scales of a super-block are given one step."""
