"""Rotary position embedding in the rotate-half form (Su et al., arXiv 2104.09864)."""

import torch
from torch import Tensor

from edgekit.models.config import ModelConfig


def rope_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines float32 `[context, 1, head_dim]`, both halves alike."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(context).float(), config.rope_theta**-exponents)
    angles = torch.cat([angles, angles], dim=1).unsqueeze(1)
    return angles.cos(), angles.sin()
