"""Rows of similar distribution, gathered into groups of equal size, and the order that does it.

What a row's distribution is: the quantiles of its values over their root mean square. Groups are
the clusters of a k-means whose clusters all have the same number of rows (JLCM, arXiv 2309.17361,
groups neurons so; how is not public).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_QUANTILES = 16
_ITERATIONS = 10


def group_order(weights: Sequence[Tensor], groups: int) -> Tensor:
    """Return an order of rows, int64 `[rows]`, whose `groups` equal runs are groups of like rows.

    Row i of every matrix `[rows, columns]` belongs together: they keep one order. ValueError where
    the groups do not divide the rows. Deterministic; rows keep their order within a group.
    """
    rows = len(weights[0])
    if rows % groups:
        raise ValueError(f"{groups} groups do not divide {rows} rows")
    features = torch.cat([_distribution(weight) for weight in weights], dim=1)
    members = balanced_clusters(features, groups)
    return members.argsort(stable=True)


def balanced_clusters(points: Tensor, clusters: int) -> Tensor:
    """Return the cluster of each point `[points, features]`, as many points in each, int64."""
    size = len(points) // clusters
    centred = points - points.mean(0)
    # Along the direction in which they differ most, the first clusters are equal runs.
    direction = torch.linalg.eigh(centred.t() @ centred)[1][:, -1]
    members = torch.empty(len(points), dtype=torch.long)
    members[(centred @ direction).argsort(stable=True)] = torch.arange(len(points)) // size
    for _ in range(_ITERATIONS):
        centres = torch.stack([points[members == each].mean(0) for each in range(clusters)])
        found = _assign(torch.cdist(points, centres), size)
        if torch.equal(found, members):
            break
        members = found
    return members


def _assign(distances: Tensor, size: int) -> Tensor:
    """Give each point its nearest cluster that has room; who loses most by waiting is first."""
    members = torch.empty(len(distances), dtype=torch.long)
    room = [size] * distances.shape[1]
    nearest = distances.argsort(dim=1, stable=True)
    two = distances.gather(1, nearest[:, :2])
    first = (two[:, -1] - two[:, 0]).argsort(descending=True, stable=True)
    choices = nearest.tolist()
    for point in first.tolist():
        cluster = next(each for each in choices[point] if room[each])
        members[point] = cluster
        room[cluster] -= 1
    return members


def _distribution(weight: Tensor) -> Tensor:
    exact = weight.detach().float()
    scaled = exact / exact.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    shares = (torch.arange(_QUANTILES) + 0.5) / _QUANTILES
    return scaled.sort(dim=1).values[:, (shares * weight.shape[1]).long()]
