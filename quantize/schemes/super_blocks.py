"""Sizes of super-blocks: 6-bit codes whose scales are whole multiples of a step in float16.

A super-block of 256 columns has one step for the scales of its 16 groups, as ggml's Q6_K has it
(ggml/src/ggml-common.h, `block_q6_K`): 18 bytes for 16 scales where bfloat16 takes 32. The scales
themselves are found in `edgekit.quantize.super_blocks`.
"""

BITS = 6
"""Codes of so many bits, and no others, have such scales."""
GROUP = 16
"""Columns that share a scale."""
GROUPS = 16
"""Scales that share a step."""
COLUMNS = GROUP * GROUPS
"""Columns of a super-block."""


def nbytes(scale_count: int) -> int:
    """Return the bytes of so many scales, their steps included."""
    return scale_count + 2 * (scale_count // GROUPS)


def check_columns(columns: int) -> None:
    """Raise ValueError for rows that are no whole super-blocks."""
    if columns % COLUMNS:
        raise ValueError(f"its blocks are of {COLUMNS} columns, which do not divide {columns}")
