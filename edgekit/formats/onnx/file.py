"""What an ONNX file is made of, read without its weights, from a file that nobody vouches for.

`OnnxFile.open` is the check before any C++ sees the file. Fields: onnx/onnx.proto.
"""

import mmap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgekit.common.files import os_reason
from edgekit.errors import EdgekitError
from edgekit.formats.onnx.checks import check_external, check_graph
from edgekit.formats.onnx.messages import read_model
from edgekit.formats.onnx.model import Graph, Tensor, UnsoundModel
from edgekit.formats.onnx.protobuf import Buffer, ProtobufError

MAX_BYTES = (1 << 31) - 1
"""Where protocol buffers end; larger models keep their weights in another file."""

_MAX_FIELDS = 400_000  # a decoder has some ten thousand
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class OnnxFile:
    """A parsed and checked model; `opsets` holds the version of each domain."""

    path: Path
    file_bytes: int
    ir_version: int
    producer: str
    opsets: dict[str, int]
    metadata: dict[str, str]
    graph: Graph

    @classmethod
    def open(cls, path: Path) -> "OnnxFile":
        """Parse and check a file; EdgekitError where it or its external data is not sound."""
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if not 0 < size <= MAX_BYTES:
                    raise EdgekitError(f"{path}: has {size} bytes, which no ONNX model has")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    parts = read_model(Buffer(data, _MAX_FIELDS, _MAX_TEXT_BYTES).message())
            check_graph(parts.graph)
            check_external(path, parts.graph)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
        except ProtobufError as error:
            raise EdgekitError(f"{path}: is no ONNX model or is damaged: {error}") from error
        except UnsoundModel as error:
            raise EdgekitError(f"{path}: {error}") from error
        return cls(path, size, **vars(parts))

    def operators(self) -> dict[str, int]:
        """Return operators with the number of their nodes, most frequent first."""
        return dict(Counter(node.operator for node in self.graph.all_nodes()).most_common())

    def external_files(self) -> list[Path]:
        """Return the files beside the model that hold constants."""
        names = {tensor.location for tensor in self.graph.all_tensors() if tensor.location}
        return [self.path.parent / name for name in sorted(names)]

    def read(self, tensor: Tensor) -> bytes:
        """Return the bytes of a constant as they are stored: little-endian, small types packed.

        EdgekitError where the file spells its values one by one, as it does with no weight.
        """
        if tensor.offset is None:
            raise EdgekitError(f"{self.path}: {tensor.name} is not stored as bytes")
        path = self.path.parent / tensor.location if tensor.location else self.path
        try:
            with path.open("rb") as file:
                file.seek(tensor.offset)
                return file.read(tensor.stored_bytes)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {os_reason(error)}") from error
