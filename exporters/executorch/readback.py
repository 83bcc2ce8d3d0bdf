"""Reads weights back from a `.pte` as the `QuantizedTensor`s that went into it.

A `.pte` names no tensor. What tells them apart is the order in which `Decoder.forward` uses them,
which a file of edgekit's keeps; every shape is checked on the way, and a count that does not come
out is refused rather than guessed at.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.formats.pte.program import FORWARD, Constant, KernelCall, Method, Program, Span
from edgekit.formats.pte.xnnpack_graph import BACKEND, GraphConstant, read_graph
from edgekit.models.architecture import Architecture, Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.models.weights import floats
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.tensor import QuantizedTensor, Weight

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


def weights(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the model by its checkpoint name, in model order, as float32.

    One is in memory at a time. The head of a tied model comes only where the file holds another
    one than the embedding. EdgekitError where the file does not hold the model of `config`.
    """
    program = Program.open(path)
    table = embedding(program)
    matrices = _named_matrices(program, config)
    vectors = _named_vectors(program, config)
    head = matrices[HEAD][0]
    for name, shape in config.tensor_shapes().items():
        if name == EMBEDDING:
            found = [table]
        elif name in matrices:
            found = matrices[name]
        else:
            found = [vectors[name]]
        yield name, _restored(program, name, found, shape)
    if config.tie_embeddings and not _same(table.read(program), head.read(program)):
        yield HEAD, _restored(program, HEAD, [head], (config.vocab_size, config.hidden_size))


def stored_size(path: Path, config: ModelConfig | None) -> StoredSize:
    """Return the bytes of the model's tensors; EdgekitError as `weights`."""
    if config is None:
        raise EdgekitError(f"{path}: nothing says which model's tensors it holds")
    program = Program.open(path)
    matrices = _named_matrices(program, config).values()
    found = [embedding(program), *chain(*matrices), *_named_vectors(program, config).values()]
    spans = {span for weight in found for span in (weight.data, weight.scales) if span is not None}
    return StoredSize(sum(span.size for span in spans), config.parameter_count)


def _restored(
    program: Program, name: str, parts: Iterable[StoredWeight], shape: tuple[int, ...]
) -> Tensor:
    """Dequantize the blocks of rows of one tensor into its shape."""
    blocks = [floats(part.read(program)) for part in parts]
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    if len(shape) == 3:  # a depthwise kernel, stored [1, kernel, 1, width]
        whole = whole.reshape(shape[2], shape[0]).t().contiguous()
    if whole.numel() != math.prod(shape):
        raise _foreign(program)
    return whole.view(shape)


def _same(one: Weight, other: Weight) -> bool:
    if isinstance(one, QuantizedTensor) and isinstance(other, QuantizedTensor):
        return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _named_matrices(program: Program, config: ModelConfig) -> dict[str, list[StoredWeight]]:
    """Give each linear's blocks of rows, in the checkpoint's order of rows, to its name."""
    expected = list(_matrix_order(config.architecture))
    shapes = {(rows, columns) for _, _, (rows, columns) in expected}
    named: dict[str, dict[int, StoredWeight]] = {}
    found = [weight for weight in linears(program) if _is_weight(program, weight, config, shapes)]
    if [weight.shape for weight in found] != [shape for _, _, shape in expected]:
        raise _foreign(program)
    for weight, (name, part, _) in zip(found, expected, strict=True):
        named.setdefault(name, {})[part] = weight
    return {name: [parts[part] for part in sorted(parts)] for name, parts in named.items()}


def _matrix_order(architecture: Architecture) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield name, block of rows and shape of each linear as `Decoder.forward` uses them."""
    for layer in architecture.layers:
        for _, block in layer.halves:
            if isinstance(block, ShortConv):
                third = block.width, block.width
                yield from ((block.into.weight.name, part, third) for part in (0, 2, 1))  # B x, C
            else:
                yield from ((each.weight.name, 0, each.weight.shape) for each in block.entering)
            yield block.leaving.weight.name, 0, block.leaving.weight.shape
    yield architecture.head.weight.name, 0, architecture.head.weight.shape


def _is_weight(
    program: Program, weight: StoredWeight, config: ModelConfig, shapes: set[tuple[int, int]]
) -> bool:
    """Tell the model's matrices from those of norms (one row of 1/d) and of RoPE's rotation."""
    if weight.shape not in shapes:
        return False
    if weight.datatype != "fp32" or weight.shape != (config.head_dim, config.head_dim):
        return True
    half = torch.eye(config.head_dim // 2)
    rotation = torch.cat([torch.cat([0 * half, -half], 1), torch.cat([half, 0 * half], 1)])
    return not torch.equal(floats(weight.read(program)), rotation)


def _named_vectors(program: Program, config: ModelConfig) -> dict[str, StoredWeight]:
    """Give each convolution, bias and norm to its name.

    Kernels are the delegates' own; the others are inputs of theirs, which the program holds in the
    order in which the modules of `Decoder` were made.
    """
    architecture = config.architecture
    stored = config.tensor_shapes()
    convs = architecture.short_convs()
    kernels = {(1, block.kernel, 1, block.width) for block in convs}
    vectors = _vector_order(architecture)
    shapes = {stored[name] for name in vectors}
    taps = [weight for weight in _others(program) if weight.shape in kernels]
    inputs = [
        StoredWeight("fp32", constant.shape, constant.span, None, None)
        for constant in _inputs(program)
        if constant.dtype == "float32" and constant.shape in shapes
    ]
    named = dict[str, StoredWeight]()
    for names, found in (([block.conv.name for block in convs], taps), (vectors, inputs)):
        sizes = [math.prod(stored[name]) for name in names]
        if [math.prod(weight.shape) for weight in found] != sizes:
            raise _foreign(program)
        named |= zip(names, found, strict=True)
    return named


def _inputs(program: Program) -> Iterator[Constant]:
    """Yield the program's constants but for what looks up the embedding."""
    forward = _forward(program)
    lookups = {
        constant.span
        for call in forward.kernel_calls
        if call.operator in EMBEDDING_OPERATORS
        for constant in call.arguments
        if constant is not None
    }
    return (constant for constant in forward.constants if constant.span not in lookups)


def _vector_order(architecture: Architecture) -> list[str]:
    """Return the names of biases and norms in the order in which `Decoder` makes them."""
    names = []
    for layer in architecture.layers:
        for _, block in layer.halves:
            linears = [*block.entering, block.leaving]
            if isinstance(block, GatedMlp):
                linears = [block.gate, block.down, block.up]
            names += [linear.bias.name for linear in linears if linear.bias is not None]
            if isinstance(block, Attention):
                norms = (block.q_norm, block.k_norm)
                names += [norm.weight.name for norm in norms if norm is not None]
        names += [norm.weight.name for norm, _ in layer.halves]
    return [*names, architecture.norm.weight.name]


def _foreign(program: Program) -> EdgekitError:
    return EdgekitError(
        f"{program.path}: its weights cannot be told apart: it does not hold the model of its "
        "config.json as edgekit writes it"
    )


def linears(program: Program) -> Iterator[StoredWeight]:
    """Yield the matrices of fully connected nodes, delegate by delegate in the order of calls."""
    return (graph_weight(constant) for constant in _constants(program) if constant.is_filter)


def _others(program: Program) -> Iterator[StoredWeight]:
    """Yield the delegates' other constants in the same order."""
    return (graph_weight(constant) for constant in _constants(program) if not constant.is_filter)


def _constants(program: Program) -> Iterator[GraphConstant]:
    forward = _forward(program)
    for index in forward.delegate_calls:
        delegate = forward.delegates[index]
        if delegate.backend == BACKEND:
            yield from read_graph(program, delegate).constants


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
