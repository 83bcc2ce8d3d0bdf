"""The weights that a target writes: quantized by the table, or read from a file of codes."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from edgekit.exporters.heap import trim_heap
from edgekit.models.checkpoint import WeightSource
from edgekit.models.codes import CodesFile
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.recipe import Table
from edgekit.quantize.tensor import QuantizedTensor, Weight


class Weights(Mapping[str, Weight]):
    """The weights to export by checkpoint name: codes are kept, floats are read when asked for.

    So a model that stays float is never in memory as a whole. Of a file of codes nothing is kept:
    each tensor is read when it is asked for. Codebooks, and codes of 5 and 6 bits, come as int8
    codes but for those that the file holds natively. `clear` forgets the codes.
    """

    def __init__(
        self,
        table: Table,
        source: WeightSource | CodesFile,
    ) -> None:
        """Quantize as the table says, unless `source` has codes."""
        self._source = source
        self._held = {row.tensor for row in table if row.scheme.name in table.native}
        self._places = {row.tensor: table.tied.get(row.tensor, row.tensor) for row in table}
        self._codes: dict[str, QuantizedTensor] = {}
        if isinstance(source, CodesFile):
            return
        quantized = replace(table, rows=[row for row in table if not row.scheme.is_float])
        self._codes = {
            name: cast(QuantizedTensor, value)
            for name, value in quantize_tensors(quantized, source.tensor)
        }

    def __getitem__(self, name: str) -> QuantizedTensor | Tensor:
        """Return the codes, or the float tensor as it is stored."""
        if isinstance(self._source, CodesFile):
            weight = self._source[self._places[name]]
        elif name in self._codes:
            weight = self._codes[name]
        else:
            weight = self._source.tensor(self._places[name])
        return stored_weight(weight, name in self._held)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a float tensor is stored."""
        return self._source.dtype(self._places[name])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in model order."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._places)

    def clear(self) -> None:
        """Forget everything; the weights cannot be read afterwards."""
        self._codes.clear()
        self._places.clear()
        trim_heap()


def stored_weight(weight: Weight, is_held: bool) -> Weight:
    """Return a weight as the file holds it."""
    return weight.as_int8() if isinstance(weight, QuantizedTensor) and not is_held else weight
