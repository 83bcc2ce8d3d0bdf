"""The scales that every target holds exactly: bfloat16 values that are normal in float16.

XNNPACK's 4-bit kernels store bfloat16, GGUF float16 and ONNX float32. A bfloat16 value has 8
significant bits and float16 has 11, so it is exact in all three where float16 is normal.
"""

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16; below it float16 loses bits."""
LARGEST_SCALE = 65280.0
"""The largest bfloat16 that float16 (at most 65504) holds."""


def round_scale(scales: Tensor, up: bool = False) -> Tensor:
    """Round positive float32 scales to the storable grid: to nearest (ties to even), or up.

    To nearest moves a scale by at most 1 part in 256. A symmetric grid has at most 128 steps on
    one side, so an element that lay at its end moves by at most half a step and is never clipped
    by more than rounding costs anyway; an affine grid is twice as long and needs `up`.
    Below 2**-14 the result is 2**-14 (an all-zero range is scale 0 here: any scale serves it).
    Raises ValueError where a scale exceeds 65280 or is not a number.
    """
    rounded = scales.to(torch.bfloat16)
    if up:
        short = rounded.to(torch.float32) < scales
        # The bit patterns of positive floats are ordered: the next pattern is the next value.
        rounded = (rounded.view(torch.int16) + short.to(torch.int16)).view(torch.bfloat16)
    result = rounded.to(torch.float32).clamp(min=SMALLEST_SCALE)
    # Written so that NaN, which compares false, is refused as well.
    if not bool((result <= LARGEST_SCALE).all()):
        raise ValueError(
            f"values up to {float(scales.max()) / LARGEST_SCALE:.3g} times the largest that can "
            f"be stored: scales end at {LARGEST_SCALE:.0f}"
        )
    return result
