"""Builds an ONNX model node by node; large constants go to a file of their own as they come.

So no more than one weight is in memory for the file, and the graph is exactly what is written
here. Format: onnx/onnx.proto and docs/ExternalData.md of ONNX.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekit.version import __version__

Dims = Sequence[int | str]
Array = NDArray[Any]
Attribute = int | float | str | Sequence[int]

IR_VERSION = 10
"""That of ONNX 1.16 and 1.17, where opset 21 and types of 4 bits appear."""
CONTRIB = "com.microsoft"
ALIGNMENT = 4096
"""What ExternalData.md recommends for mapping a file into memory."""
INLINE_BYTES = 1 << 16
"""Constants below this size stay in the model's file."""


class OnnxGraph:
    """A graph that grows; names of values are returned and given.

    A node's name is also that of its (first) output, and starts with that of its layer.
    """

    LAST = (1 << 63) - 1
    """A slice's end: that of the axis."""

    def __init__(self, data: BinaryIO, data_name: str, opsets: dict[str, int]) -> None:
        """Start with nothing; `data` receives the large constants, `data_name` is its file."""
        self._data, self._data_name = data, data_name
        self._opsets = opsets
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def input(self, name: str, dtype: int, dims: Dims) -> str:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def input_dims(self, name: str) -> list[int]:
        """Return the dimensions of an input, 0 for a symbol."""
        found = next(value for value in self._inputs if value.name == name)
        return [dim.dim_value for dim in found.type.tensor_type.shape.dim]

    def output(self, name: str, dtype: int, dims: Dims) -> str:
        """Declare an output; a node must be given this name for what it makes."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, dims))
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *more_outputs: str,
        **attributes: Attribute,
    ) -> str:
        """Append a node of ONNX's own; return its first output, which has its name."""
        return self._append("", op, inputs, [name, *more_outputs], attributes)

    def contrib(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *more_outputs: str,
        **attributes: Attribute,
    ) -> str:
        """Append a node of ONNX Runtime's own."""
        return self._append(CONTRIB, op, inputs, [name, *more_outputs], attributes)

    def _append(
        self,
        domain: str,
        op: str,
        inputs: Sequence[str],
        outputs: list[str],
        attributes: dict[str, Attribute],
    ) -> str:
        made = helper.make_node(
            op, inputs, outputs, name=outputs[0], domain=domain or None, **attributes
        )
        self._nodes.append(made)
        return outputs[0]

    def integers(self, *values: int) -> str:
        """Return a constant int64 `[n]`."""
        name = f"int64{list(values)}".replace(" ", "")
        return self.small(name, np.array(values, np.int64))

    def small(self, name: str, values: Array | np.generic) -> str:
        """Return a constant of the model's own file, the same for the same name."""
        if name not in self._constants:
            self._constants[name] = onnx.numpy_helper.from_array(np.asarray(values), name)
        return name

    def constant(self, name: str, dtype: int, dims: Sequence[int], parts: Iterable[Array]) -> str:
        """Store a constant once; `parts` are its little-endian bytes in order, as arrays."""
        if name in self._constants:
            return name
        size = -(-int(np.prod(dims, dtype=np.int64)) * _bits(dtype) // 8)
        tensor = TensorProto(name=name, data_type=dtype, dims=dims)
        if size < INLINE_BYTES:
            tensor.raw_data = b"".join(part.tobytes() for part in parts)
        else:
            self._data.write(bytes(-self._data.tell() % ALIGNMENT))
            offset = self._data.tell()
            for part in parts:
                self._data.write(np.ascontiguousarray(part).data)
            _place(tensor, self._data_name, offset, self._data.tell() - offset)
        self._constants[name] = tensor
        return name

    def alias(self, name: str, of: str, dims: Sequence[int]) -> str:
        """Name the bytes of another constant, in another shape."""
        tensor = TensorProto()
        tensor.CopyFrom(self._constants[of])
        tensor.name = name
        tensor.dims[:] = dims
        self._constants[name] = tensor
        return name

    def split(self, value: str, sizes: Sequence[int], name: str) -> list[str]:
        """Cut the last axis."""
        names = [name, *(f"{name}.{i}" for i in range(1, len(sizes)))]
        self.node("Split", [value, self.integers(*sizes)], *names, axis=-1)
        return names

    def last(self, value: str, count: str, axis: int, name: str) -> str:
        """Take the last entries of an axis; `count` is a name of minus their number, int64 [1]."""
        inputs = [value, count, self.integers(self.LAST), self.integers(axis)]
        return self.node("Slice", inputs, name)

    def rows(self, value: str, places: str, name: str) -> str:
        """Take rows of `[batch, rows, width]`; `places` is `[batch, n, 1]`."""
        return self.node("GatherND", [value, places], name, batch_dims=1)

    def model(self, name: str) -> onnx.ModelProto:
        """Return the whole model, its graph called `name`."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._constants.values())
        )
        opsets = [helper.make_opsetid(name, version) for name, version in self._opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        model.producer_name, model.producer_version = "edgekit", __version__
        return model


@contextmanager
def new_data_file(path: Path) -> Iterator[BinaryIO]:
    """Give the file of the large constants to write; an empty one is not left behind."""
    with path.open("wb") as file:
        yield file
        empty = file.tell() == 0
    if empty:
        path.unlink()


def _bits(dtype: int) -> int:
    if dtype in (TensorProto.INT4, TensorProto.UINT4):
        return 4
    size: int = helper.tensor_dtype_to_np_dtype(dtype).itemsize
    return 8 * size


def _place(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
