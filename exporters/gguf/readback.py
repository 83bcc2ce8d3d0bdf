"""The weights of a GGUF by their checkpoint names, as its engine multiplies them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.exporters.gguf.names import ROPE_DIVISORS, gguf_names
from edgekit.exporters.gguf.row_orders import row_orders
from edgekit.exporters.gguf.sizes import size_of
from edgekit.formats.gguf.file import GgufFile, GgufTensor
from edgekit.models.config import ModelConfig


def weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor dequantized to float32, in the file's order, one in memory at a time.

    gguf-py dequantizes, so neither what wrote the file nor its engine takes part. The head of a
    tied model comes only where the file holds one of its own. EdgekitError for a damaged file, and
    for one whose tensors are not those of `config`.
    """
    file = GgufFile.open(path)
    names = {stored: name for name, stored in gguf_names(config).items()}
    shapes, _ = config.tied_shapes()
    orders = row_orders(config)
    for tensor in file.tensors.values():
        if tensor.name == ROPE_DIVISORS and config.rope.scaling is not None:
            continue
        name = names.get(tensor.name, "")
        expected = shapes.get(name, ())
        if tensor.shape != tuple(n for i, n in enumerate(expected) if len(expected) < 3 or i != 1):
            raise EdgekitError(
                f"{path}: tensor {tensor.name!r:.80} of shape {list(tensor.shape)} is none of the "
                "model's"
            )
        yield name, _restored(_floats(file, tensor).view(expected), orders.get(name))


def _restored(values: Tensor, order: Tensor | None) -> Tensor:
    """Put rows back to where the checkpoint has them."""
    return values if order is None else values[order.argsort()]


def stored_size(path: Path, config: ModelConfig | None = None) -> StoredSize:
    """Return the bytes of all tensors and the weights in them; `config` is not needed."""
    return size_of(GgufFile.open(path))


def _floats(file: GgufFile, tensor: GgufTensor) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.frombuffer(file.data(tensor), np.uint8).reshape(*tensor.shape[:-1], -1)
    try:
        values = dequantize(rows, GGMLQuantizationType[tensor.type])
    except (KeyError, NotImplementedError) as error:
        raise EdgekitError(
            f"{file.path}: tensor {tensor.name} is of type {tensor.type}, which gguf-py cannot read"
        ) from error
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


class StoredWeights(Mapping[str, Tensor]):
    """What `weights` yields, each read when it is asked for; a tied head is the embedding."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Open a file; EdgekitError where it is no GGUF."""
        self._file = GgufFile.open(path)
        self._shapes, ties = config.tied_shapes()
        self._orders = row_orders(config)
        names = {stored: name for name, stored in gguf_names(config).items()}
        self._tensors = {
            names[name]: each for name, each in self._file.tensors.items() if name in names
        }
        for name, source in ties.items():
            self._tensors.setdefault(name, self._tensors[source])

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its checkpoint name, float32."""
        values = _floats(self._file, self._tensors[name]).view(self._shapes[name])
        return _restored(values, self._orders.get(name))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the file's order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors, a tied head counted too."""
        return len(self._tensors)
