"""The weights of a GGUF by their checkpoint names, as its engine multiplies them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.gguf_names import checkpoint_names
from edgekit.gguf_file import GgufFile, GgufTensor
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import HEAD


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
