"""Reads weights back from a `.pte` as the `QuantizedTensor`s that went into it: for tests alone.

At a user's, `edgekit inspect --check` compares the sha256 of the whole file, which says more.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.pte import FORWARD, Constant, KernelCall, Method, Program, Span
from edgekit.exporters.xnnpack_graph import BACKEND, GraphConstant, read_graph
from edgekit.models.weights import Weight
from edgekit.quantize.tensor import QuantizedTensor

EMBEDDING_OPERATORS = (
    "quantized_decomposed::embedding_byte.out",
    "quantized_decomposed::embedding_4bit.out",
    "aten::embedding.out",
)
_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StoredWeight:
    """A matrix of the file: XNNPACK's datatype or the constant's dtype, and where it lies."""

    datatype: str
    shape: tuple[int, ...]
    data: Span
    scales: Span | None
    group_size: int | None

    def read(self, program: Program) -> Weight:
        """Return its codes and scales, or its floats; EdgekitError where sizes contradict."""
        try:
            return self._decode(program)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise EdgekitError(
                f"{program.path}: is damaged: a {self.datatype} matrix of shape {self.shape} "
                f"cannot be read: {error}"
            ) from error

    def _decode(self, program: Program) -> Weight:
        data = _tensor(program, self.data, torch.uint8)
        if self.datatype in _FLOATS:
            return data.view(_FLOATS[self.datatype]).view(self.shape)
        if self.scales is None:
            raise ValueError("it has no scales")
        if self.datatype in ("qcint4", "qbint4", "nibbles"):
            codes, bits = _nibbles(data, first_is_high=self.datatype == "nibbles"), 4
        elif self.datatype in ("qcint8", "int8"):
            codes, bits = data.view(torch.int8), 8
        else:
            raise ValueError("its datatype is none that is written here")
        scale_type = torch.bfloat16 if self.datatype == "qbint4" else torch.float32
        scales = _tensor(program, self.scales, torch.uint8).view(scale_type).float()
        rows, columns = self.shape
        if self.group_size is None:
            return QuantizedTensor(codes.view(self.shape), scales, bits=bits, axis=0)
        return QuantizedTensor(
            codes.view(self.shape),
            scales.view(rows, columns // self.group_size),
            bits=bits,
            group_size=self.group_size,
        )


def linears(program: Program) -> Iterator[StoredWeight]:
    """Yield the matrices of fully connected nodes, delegate by delegate in the order of calls."""
    forward = _forward(program)
    for index in forward.delegate_calls:
        delegate = forward.delegates[index]
        if delegate.backend == BACKEND:
            for constant in read_graph(program, delegate).constants:
                if constant.is_filter:
                    yield graph_weight(constant)


def graph_weight(constant: GraphConstant) -> StoredWeight:
    """Return a delegate's constant as a weight."""
    return StoredWeight(
        constant.datatype, constant.shape, constant.data, constant.scales, constant.group_size
    )


def embedding(program: Program) -> StoredWeight:
    """Return the embedding's table."""
    for call in _forward(program).kernel_calls:
        if call.operator in EMBEDDING_OPERATORS:
            return _embedding(program, call)
    raise EdgekitError(f"{program.path}: {FORWARD} looks up no embedding")


def _embedding(program: Program, call: KernelCall) -> StoredWeight:
    constants = [constant for constant in call.arguments[:2] if constant is not None]
    table = constants[0] if constants else None
    if table is None or len(table.shape) != 2:
        raise EdgekitError(f"{program.path}: the embedding's table is not in the file")
    if len(constants) == 1:
        name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(table.dtype, "")
        return StoredWeight(name, table.shape, table.span, None, None)
    packed = table.dtype == "uint8"
    rows, columns = table.shape[0], table.shape[1] * (2 if packed else 1)
    return StoredWeight(
        "nibbles" if packed else table.dtype,
        (rows, columns),
        table.span,
        constants[1].span,
        _group_size(constants[1], rows, columns),
    )


def _group_size(scales: Constant, rows: int, columns: int) -> int | None:
    groups = math.prod(scales.shape) // max(1, rows)
    return None if len(scales.shape) == 1 or groups < 1 else columns // groups


def _nibbles(data: Tensor, first_is_high: bool) -> Tensor:
    halves = (data >> 4, data & 15) if first_is_high else (data & 15, data >> 4)
    return (torch.stack(halves, dim=-1).flatten().to(torch.int8)) - 8


def _tensor(program: Program, span: Span, dtype: torch.dtype) -> Tensor:
    """Read a span into memory of its own, once."""
    data = np.fromfile(program.path, np.uint8, span.size, offset=span.offset)
    return torch.from_numpy(data).view(dtype)


def _forward(program: Program) -> Method:
    if FORWARD not in program.methods:
        raise EdgekitError(f"{program.path}: has no method {FORWARD!r}")
    return program.methods[FORWARD]
