"""Codes out of a model file: the integers and scales that its weights were dequantized from.

`weights` gives floats, which are code times scale, exactly. Any integers and scales with the same
products serve to compute what the engine computes, which rounds a linear's inputs by the shape of
its groups alone; the largest such scale is taken.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.readback import read_weights
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import grid_of
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.scales import SMALLEST_SCALE
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight


def read_codes(
    target: str, path: Path, config: ModelConfig, rows: Sequence[Resolved]
) -> Mapping[str, Weight]:
    """Return the weights of a file by their checkpoint names, as the rows say that they are.

    EdgekitError where the file holds other tensors, or values that are none of a row's scheme.
    """
    schemes = {row.tensor: row.scheme for row in rows}
    found: dict[str, Weight] = {}
    for name, values in read_weights(target, path, config):
        scheme = schemes.get(name)
        if scheme is None:
            raise EdgekitError(f"{path}: tensor {name} is none of the manifest's")
        try:
            found[name] = values if scheme.is_float else codes_of(values, scheme)
        except ValueError as error:
            raise EdgekitError(f"{path}: tensor {name}: {error}") from error
    if HEAD in schemes and HEAD not in found and EMBEDDING in found:
        found[HEAD] = found[EMBEDDING]
    missing = next((name for name in schemes if name not in found), None)
    if missing is not None:
        raise EdgekitError(f"{path}: holds no tensor {missing}")
    return found


def codes_of(values: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Return codes of a scheme that dequantize to a matrix exactly; ValueError where none do."""
    rows, columns = values.shape
    grid, size = grid_of(scheme), scheme.group_size or columns
    groups = values.reshape(-1, size)
    codes = torch.zeros(groups.shape, dtype=torch.int16)
    scales = torch.full((len(groups),), SMALLEST_SCALE)
    least = torch.where(groups == 0, torch.inf, groups.abs()).amin(1)
    left = least.isfinite().nonzero()[:, 0]  # a group of zeros is code 0 at any scale
    for code in range(1, max(grid.high, -grid.low) + 1):
        if not len(left):
            break
        scale = least[left] / code
        steps = (groups[left] / scale[:, None]).round_()
        exact = (steps * scale[:, None] == groups[left]).all(1)
        if scheme.symmetric:
            fits = (steps.amin(1) >= grid.low) & (steps.amax(1) <= grid.high)
        else:
            fits = steps.amax(1).clamp(min=0) - steps.amin(1).clamp(max=0) <= grid.high
        done = exact & fits
        codes[left[done]] = steps[done].to(torch.int16)
        scales[left[done]] = scale[done]
        left = left[~done]
    if len(left):
        raise ValueError(f"{len(left)} of its scales are none of {scheme.name}")
    zeros = None
    if not scheme.symmetric:
        zeros = (-codes.amin(1).clamp(max=0)).to(torch.int32)
        codes += zeros[:, None].to(torch.int16)
    per_group = scheme.group_size is not None
    return QuantizedTensor(
        codes.to(grid.dtype).reshape(rows, columns),
        scales.reshape(rows, -1) if per_group else scales,
        None if zeros is None else zeros.reshape(rows, -1),
        bits=grid.bits,
        group_size=scheme.group_size,
        axis=None if per_group else 0,
    )
