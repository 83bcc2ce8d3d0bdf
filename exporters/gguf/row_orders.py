"""The order in which llama.cpp wants the rows of queries and keys."""

import torch
from torch import Tensor

from edgekit.exporters.gguf.architectures import find_architecture
from edgekit.models.config import ModelConfig


def row_orders(config: ModelConfig) -> dict[str, Tensor]:
    """Return, by checkpoint name, which row stands where in the file, for those that are moved.

    Of `n` rows int64 `[n]`. A row moves whole, with its codes and scales.
    """
    if not find_architecture(config).pairs:
        return {}
    orders: dict[str, Tensor] = {}
    for block in config.architecture.attentions():
        for linear, heads in ((block.q, block.heads), (block.k, block.kv_heads)):
            rows = torch.arange(heads * block.head_dim).view(heads, 2, -1)
            order = rows.transpose(1, 2).flatten()
            orders |= {tensor.name: order for tensor in linear.tensors}
    return orders
