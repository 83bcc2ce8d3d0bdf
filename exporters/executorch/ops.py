"""Operators that XNNPACK computes and `torch.export` has no single node for.

Each is one node of the traced graph, with torch's own operators for its meaning, and some nodes of
XNNPACK's graph (`xnnpack_nodes.py`). One node instead of a dozen also keeps two run-time lengths,
the prompt's and the position's, out of shapes that ExecuTorch's partitioner cannot follow.
"""

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.models.eager import grouped_query_attention


@torch.library.custom_op("edgekit::causal_attention", mutates_args=())
def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Grouped-query attention of `n` tokens to the `end` positions up to and with their own.

    query `[n, heads, head_dim]`; keys, values `[1, end, kv_heads, head_dim]`; rows `[n, group]`
    (group = heads / kv_heads) holds each query's position `group` times, columns `[1, end]` the
    keys' positions, both as float32. Returns `[n, heads * head_dim]`.
    """
    mask = columns <= rows[:, :1]
    return grouped_query_attention(query, keys[0], values[0], mask)


@causal_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1] * query.shape[2])


@torch.library.custom_op("edgekit::depthwise_conv", mutates_args=())
def depthwise_conv(padded: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution over the rows of `padded [n + k - 1, d]` by `weight [1, k, 1, d]`.

    `y[t] = sum_j weight[j] padded[t + j]`, `[n, d]`.
    """
    taps = weight[0, :, 0].t()[:, None]
    return functional.conv1d(padded.t()[None], taps, groups=taps.shape[0])[0].t().contiguous()


@depthwise_conv.register_fake
def _(padded: Tensor, weight: Tensor) -> Tensor:
    return padded.new_empty(padded.shape[0] - weight.shape[1] + 1, padded.shape[1])
