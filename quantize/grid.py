"""The integer codes that a uniform quantizer may use."""

from dataclasses import dataclass

import torch

from edgekit.quantize.scales import CANDIDATES_OF_Q6_K, SCALES, SCALES_OF_Q4_1, ScaleGrid
from edgekit.quantize.schemes import super_blocks
from edgekit.quantize.schemes.sizes import PACKABLE_BITS, code_range


@dataclass(frozen=True)
class Grid:
    """A run of integers (arXiv 1806.08342, section 2).

    bits        2, 3, 4, 5, 6 or 8
    symmetric   int8 codes around 0 without a zero point (section 2.2); else uint8 codes from 0
                to N - 1 with one (section 2.1)
    restricted  leave out the lowest code, so that both sides are as long: [-127, 127], [-7, 7]
    """

    bits: int
    symmetric: bool = True
    restricted: bool = False

    def __post_init__(self) -> None:
        """Refuse combinations that the whitepaper does not have."""
        if self.bits not in PACKABLE_BITS:
            raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {self.bits}")
        if self.restricted and not self.symmetric:
            raise ValueError("a restricted range is for symmetric grids: affine ones use all codes")

    @property
    def low(self) -> int:
        """The lowest code."""
        return code_range(self.bits, self.symmetric)[0] + self.restricted

    @property
    def high(self) -> int:
        """The highest code."""
        return code_range(self.bits, self.symmetric)[1]

    @property
    def scales(self) -> ScaleGrid:
        """The scales that every target can store for such codes; of 6 bits, candidates for them."""
        if self.two_levels:
            return CANDIDATES_OF_Q6_K
        return SCALES if self.symmetric or self.bits != 4 else SCALES_OF_Q4_1

    @property
    def two_levels(self) -> bool:
        """Whether scales are of two levels (`edgekit.quantize.super_blocks`)."""
        return self.bits == super_blocks.BITS

    @property
    def dtype(self) -> torch.dtype:
        """The type of the codes."""
        return torch.int8 if self.symmetric else torch.uint8
