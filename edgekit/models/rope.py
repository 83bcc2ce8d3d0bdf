"""Rotary position embedding in the rotate-half form (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor

from edgekit.models.architecture import Rope


def rope_tables(rope: Rope, head_dim: int, context: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines float32 `[context, 1, head_dim]`, both halves alike."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = rope.theta**-exponents
    divisors = rope.divisors(head_dim)
    if divisors is not None:
        frequencies = frequencies / torch.tensor(divisors)
    angles = torch.outer(torch.arange(context).float(), frequencies)
    angles = torch.cat([angles, angles], dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()
