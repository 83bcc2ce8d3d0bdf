"""An LFM2 whose neurons stand in another order: the same function, other rows beside each other.

Where rows of one matrix meet the columns of the next one by one, both may be permuted together and
nothing has to be stored. That is so for

- the hidden units of a feed-forward: rows of w1 and w3, columns of w2
- the channels of a short convolution: the rows of in_proj's three blocks, the depthwise kernels,
  the columns of out_proj.

It is not so for what writes the residual (w2, out_proj, whose order all layers share) nor for
queries and keys, whose rotation and norms know each dimension; these keep theirs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from edgekit.models.config import ModelConfig
from edgekit.quantize.codebook.grouping import group_order
from edgekit.quantize.recipe import Resolved

Read = Callable[[str], Tensor]
Orders = dict[str, Tensor]
"""By the prefix of a feed-forward or a convolution the order of its neurons, int64."""


def grouped_orders(config: ModelConfig, rows: Iterable[Resolved], read: Read) -> Orders:
    """Return the orders that put like neurons together, for matrices with several codebooks.

    A part of the model whose matrices have one codebook each keeps its order.
    """
    books = {row.tensor: row.scheme.books for row in rows}
    orders = {}
    for index, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{index}.feed_forward"
        names = [f"{prefix}.{name}.weight" for name in ("w1", "w3")]
        groups = max(books.get(name, 0) for name in names)
        if groups > 1:
            orders[prefix] = group_order([read(name) for name in names], groups)
        prefix = f"model.layers.{index}.conv"
        name = f"{prefix}.in_proj.weight"
        # Of three blocks, each has a third of the codebooks; where they do not divide, one each.
        groups = books.get(name, 0) // 3
        if kind == "conv" and groups > 1 and config.hidden_size % groups == 0:
            orders[prefix] = group_order(read(name).chunk(3), groups)
    return orders


def reordered(read: Read, orders: Orders) -> Read:
    """Return a reader of the model's weights with its neurons in those orders."""

    def read_reordered(name: str) -> Tensor:
        prefix, _, tensor = name.removesuffix(".weight").rpartition(".")
        order = orders.get(prefix)
        return read(name) if order is None else _reorder(tensor, read(name), order)

    return read_reordered


def _reorder(tensor: str, weight: Tensor, order: Tensor) -> Tensor:
    """Reorder one tensor of a feed-forward or a convolution by its own name."""
    if tensor in ("w1", "w3", "conv"):
        return weight[order]
    if tensor == "in_proj":
        return torch.cat([block[order] for block in weight.chunk(3)])
    return weight[:, order]  # w2 and out_proj
