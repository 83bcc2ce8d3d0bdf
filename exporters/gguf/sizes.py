"""How much a GGUF holds."""

from math import prod

from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.formats.gguf.file import GgufFile


def size_of(file: GgufFile) -> StoredSize:
    """Return the bytes and the number of all weights."""
    tensors = file.tensors.values()
    return StoredSize(
        sum(tensor.nbytes for tensor in tensors), sum(prod(tensor.shape) for tensor in tensors)
    )
