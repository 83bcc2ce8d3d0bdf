"""Weights as constants of an ONNX graph."""

from collections.abc import Iterator, Sequence

from onnx import TensorProto
from torch import Tensor

from edgekit.exporters.onnx.graph import Array, OnnxGraph
from edgekit.exporters.onnx.names import SCALES, ZERO_POINTS
from edgekit.exporters.onnx.packing import Packed
from edgekit.quantize.packing import pack
from edgekit.quantize.tensor import Weight

_CHUNK_ELEMENTS = 1 << 22
_CODE_TYPES = {
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
}


def store_floats(graph: OnnxGraph, name: str, values: Tensor) -> str:
    """Store a tensor of any float type as float32."""
    return graph.constant(name, TensorProto.FLOAT, values.shape, _as_float32(values))


def store_packed(
    graph: OnnxGraph, name: str, packed: Packed, dims: Sequence[int], twin: str | None = None
) -> list[str]:
    """Store numbers in the shape `dims`, scales and zero points; return their names.

    With a `twin`, a weight of the same codes, the names stand for its bytes and nothing is stored.
    """
    stored = [(name, TensorProto.UINT8, tuple(dims), packed.numbers)]
    stored.append((name + SCALES, TensorProto.FLOAT, packed.scales.shape, packed.scales))
    if packed.zero_points is not None:
        points = packed.zero_points
        stored.append((name + ZERO_POINTS, TensorProto.UINT8, points.shape, points))
    if twin is not None:
        return [
            graph.alias(own, twin + own.removeprefix(name), shape) for own, _, shape, _ in stored
        ]
    return [
        graph.constant(own, dtype, shape, [values.numpy()]) for own, dtype, shape, values in stored
    ]


def store_turned(graph: OnnxGraph, name: str, weight: Weight) -> tuple[list[str], dict[str, int]]:
    """Store a matrix `[rows, columns]` as `[columns, rows]`.

    Return the constants, codes, scales and zero points, and DequantizeLinear's attributes for
    them; of a float matrix the one constant.
    """
    if isinstance(weight, Tensor):
        turned = weight.float().t().contiguous()
        return [store_floats(graph, name, turned)], {}
    dtype = _CODE_TYPES[weight.bits, weight.signed]
    shape = [weight.shape[1], weight.shape[0]]

    def codes(values: Tensor) -> Array:
        flat = values.t().contiguous()
        return (pack(flat.reshape(1, -1), 4) if weight.bits == 4 else flat).numpy()

    scales = weight.scales.t().contiguous()
    constants = [
        graph.constant(name, dtype, shape, [codes(weight.codes)]),
        graph.constant(name + SCALES, TensorProto.FLOAT, scales.shape, [scales.numpy()]),
    ]
    if weight.zero_points is not None:
        points = weight.zero_points.to(weight.codes.dtype)
        constants.append(graph.constant(name + ZERO_POINTS, dtype, scales.shape, [codes(points)]))
    if weight.group_size is None:
        return constants, {"axis": 1}
    return constants, {"axis": 0, "block_size": weight.group_size}


def _as_float32(values: Tensor) -> Iterator[Array]:
    rows = values.reshape(len(values), -1)
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        yield rows[start : start + step].float().numpy()
