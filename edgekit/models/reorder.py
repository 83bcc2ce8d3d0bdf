"""A model whose neurons stand in another order: the same function, other rows beside each other.

Where rows of one matrix meet the columns of the next one by one, both may be permuted together and
nothing has to be stored. That is so for

- the hidden units of a feed-forward: rows of gate and up, columns of down
- the channels of a short convolution: the rows of the three blocks of what enters, the depthwise
  kernels, the columns of what leaves.

It is not so for what writes the residual (what leaves a block, whose order all layers share) nor
for queries and keys, whose rotation and norms know each dimension; these keep theirs.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from edgekit.models.architecture import Architecture, Block, GatedMlp, ShortConv
from edgekit.quantize.codebook.grouping import group_order
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.schemes.codebook import Codebook

Read = Callable[[str], Tensor]
Orders = dict[str, Tensor]
"""By the name of a block the order of its neurons, int64."""


def grouped_orders(architecture: Architecture, rows: Iterable[Resolved], read: Read) -> Orders:
    """Return the orders that put like neurons together, for matrices with several codebooks.

    A block whose matrices have one codebook each keeps its order.
    """
    books = {row.tensor: row.scheme.books for row in rows if isinstance(row.scheme, Codebook)}
    orders = {}
    for block in _blocks(architecture):
        names = [linear.weight.name for linear in block.entering]
        groups = max(books.get(name, 0) for name in names)
        if isinstance(block, GatedMlp):
            if groups > 1:
                orders[block.name] = group_order([read(name) for name in names], groups)
        elif isinstance(block, ShortConv):
            # Of three blocks, each has a third of the codebooks; where they do not divide, one.
            groups //= 3
            if groups > 1 and block.width % groups == 0:
                orders[block.name] = group_order(read(names[0]).chunk(3), groups)
    return orders


def reordered(architecture: Architecture, read: Read, orders: Orders) -> Read:
    """Return a reader of the model's weights with its neurons in those orders."""
    moves: dict[str, Callable[[Tensor], Tensor]] = {}
    for block in _blocks(architecture):
        if block.name in orders:
            moves |= _moves(block, orders[block.name])

    def read_reordered(name: str) -> Tensor:
        return moves[name](read(name)) if name in moves else read(name)

    return read_reordered


def _blocks(architecture: Architecture) -> Iterator[Block]:
    for layer in architecture.layers:
        yield from (block for _, block in layer.halves)


def _moves(block: Block, order: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return by name what moves each tensor of a block; a bias of what leaves stays."""

    def rows(weight: Tensor) -> Tensor:
        return weight[order]

    def three(weight: Tensor) -> Tensor:
        return torch.cat([part[order] for part in weight.chunk(3)])

    def columns(weight: Tensor) -> Tensor:
        return weight[:, order]

    own: dict[str, Callable[[Tensor], Tensor]] = {block.leaving.weight.name: columns}
    entering = [tensor.name for linear in block.entering for tensor in linear.tensors]
    if isinstance(block, ShortConv):
        return own | dict.fromkeys(entering, three) | {block.conv.name: rows}
    return own | dict.fromkeys(entering, rows)
