"""The weights of a GGUF by their checkpoint names, as its engine multiplies them."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.exporters.gguf.names import checkpoint_names
from edgekit.formats.gguf.file import GgufFile, GgufTensor
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import EMBEDDING, HEAD


def weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor dequantized to float32, in the file's order, one in memory at a time.

    gguf-py dequantizes, so neither what wrote the file nor its engine takes part. The head of a
    tied model comes only where the file holds one of its own. EdgekitError for a damaged file, and
    for one whose tensors are not those of `config`.
    """
    file = GgufFile.open(path)
    names = checkpoint_names(config.num_layers)
    shapes = config.tensor_shapes()
    shapes.setdefault(HEAD, (config.vocab_size, config.hidden_size))
    for tensor in file.tensors.values():
        name = names.get(tensor.name, "")
        expected = shapes.get(name, ())
        if tensor.shape != tuple(n for i, n in enumerate(expected) if len(expected) < 3 or i != 1):
            raise EdgekitError(
                f"{path}: tensor {tensor.name!r:.80} of shape {list(tensor.shape)} is none of the "
                "model's"
            )
        yield name, _floats(file, tensor).view(expected)


def stored_size(path: Path, config: ModelConfig | None = None) -> StoredSize:
    """Return the bytes of all tensors and the weights in them; `config` is not needed."""
    return size_of(GgufFile.open(path))


def size_of(file: GgufFile) -> StoredSize:
    """Return the same of an open file."""
    tensors = file.tensors.values()
    return StoredSize(
        sum(tensor.nbytes for tensor in tensors), sum(prod(tensor.shape) for tensor in tensors)
    )


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
        self._shapes = config.tensor_shapes()
        names = checkpoint_names(config.num_layers)
        self._tensors = {names.get(name, name): each for name, each in self._file.tensors.items()}
        if config.tie_embeddings and HEAD not in self._tensors:
            self._tensors[HEAD] = self._tensors[EMBEDDING]

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its checkpoint name, float32."""
        values = _floats(self._file, self._tensors[name])
        return values.view(self._shapes.get(name, values.shape))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the file's order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors, a tied head counted too."""
        return len(self._tensors)
