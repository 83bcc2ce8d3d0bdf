"""Quantizing a model into one safetensors file."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.quantize.apply import Applied, apply, sqnr_db
from edgekit.quantize.recipe import Table
from edgekit.quantize.storage import About, save_quantized
from edgekit.quantize.tensor import QuantizedTensor, Weight


def quantize_to_file(
    table: Table,
    get_tensor: Callable[[str], Tensor],
    path: Path,
    on_tensor: Callable[[str], None] | None = None,
    about: About | None = None,
) -> dict[str, float]:
    """Write the codes and scales of a table to `path` and return each tensor's SQNR in dB.

    Float tensors are written as float32, what the table counts, and are not in the result.
    `get_tensor` is that of `quantize_tensors`; `on_tensor` hears each name when it
    is done, `about` is what the file says of itself. Raises EdgekitError naming the tensor, or the
    file where it cannot be written.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # the safetensors library takes names as UTF-8 alone
        raise EdgekitError(f"{path}: its name is not UTF-8; give another name") from error
    contents: dict[str, Weight] = {}
    sqnr: dict[str, float] = {}
    for applied in apply(table, get_tensor):
        _add(applied, contents, sqnr)
        if on_tensor is not None:
            on_tensor(applied.row.tensor)
    save_quantized(path, contents, about)
    return sqnr


def _add(applied: Applied, contents: dict[str, Weight], sqnr: dict[str, float]) -> None:
    """Add one tensor to the file's contents and measure it, unless that was done before."""
    name, value = applied.row.tensor, applied.value
    if applied.same_as is not None:
        contents[name] = contents[applied.same_as]
        if applied.same_as in sqnr:
            sqnr[name] = sqnr[applied.same_as]
    elif isinstance(value, QuantizedTensor):
        assert applied.weight is not None  # only a repeated value has none
        contents[name] = value
        sqnr[name] = sqnr_db(applied.weight, value)
    else:
        contents[name] = value.to(torch.float32)
