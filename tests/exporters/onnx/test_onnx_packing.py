"""MatMulNBits' layout of codes, against arithmetic on its bytes and against ONNX Runtime itself."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters.onnx.layout import LARGEST_BLOCK, block_size
from edgekit.exporters.onnx.packing import (
    Packed,
    pack_matrix,
    stack,
    unpack_matrix,
)
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor

ROWS, COLUMNS = 24, 192
SCHEMES = ("w8", "w4", "w8g16", "w8g32", "w8g96", "w4g32", "w4g64", "w4g192", "w4g32a", "w4g64a")


def quantized(scheme: str, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return quantize_weight(parse_scheme(scheme), weight)


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bytes_stand_for_the_weights(scheme: str) -> None:
    weight = quantized(scheme)
    packed = pack_matrix(weight)
    numbers = packed.numbers.numpy()
    numbers = nibbles(numbers) if packed.bits == 4 else numbers
    zeros = np.full(packed.scales.shape, 1 << (packed.bits - 1), np.float32)
    if packed.zero_points is not None:
        zeros = nibbles(packed.zero_points.numpy())[:, : zeros.shape[1]].astype(np.float32)
    spread = [np.repeat(values, packed.block_size, 1) for values in (zeros, packed.scales.numpy())]
    values = (numbers.astype(np.float32) - spread[0]) * spread[1]
    assert np.array_equal(values, weight.dequantize().numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_gives_back_every_bit(scheme: str) -> None:
    weight = quantized(scheme)
    packed = pack_matrix(weight)
    assert packed.shape == weight.shape
    again = unpack_matrix(packed)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_codes_with_and_without_zero_points(bits: int, signed: bool) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    codes = (torch.arange(64) % (1 << bits) + low).to(torch.int8 if signed else torch.uint8)
    zeros = torch.tensor([[low, low + (1 << bits) - 1], [0, 3]], dtype=torch.int32)
    for points in (None, zeros):
        weight = QuantizedTensor(
            codes.view(2, 32), torch.ones(2, 2), points, bits=bits, group_size=16
        )
        packed = pack_matrix(weight)
        # the default zero point is the middle, which unsigned codes without one do not have
        assert (packed.zero_points is None) == (points is None and signed)
        assert torch.equal(unpack_matrix(packed).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("columns", "group", "block"),
    [(1024, None, 256), (4608, None, 256), (192, None, 64), (32, None, 32), (4096, 32, 32)]
    + [(4096, 96, 32), (4096, 128, 128), (4096, 512, 256)],
)
def test_a_block_is_a_power_of_two_that_divides_what_shares_a_scale(
    columns: int, group: int | None, block: int
) -> None:
    assert block_size(columns, group) == block <= LARGEST_BLOCK


def test_rows_below_each_other() -> None:
    parts = [pack_matrix(quantized("w4g32a", rows)) for rows in (8, 16)]
    both = stack(parts)
    assert both.shape == (24, COLUMNS)
    assert torch.equal(
        unpack_matrix(both).dequantize(),
        torch.cat([unpack_matrix(part).dequantize() for part in parts]),
    )


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("scheme", [*SCHEMES, "w8/1024", "w4/1024", "w8/32"])
def test_onnxruntime_multiplies_and_looks_up_what_was_packed(scheme: str, rows: int) -> None:
    name, _, columns = scheme.partition("/")
    weight = quantized(name, ROWS, int(columns or COLUMNS))
    packed, exact = pack_matrix(weight), weight.dequantize().numpy()
    x = np.random.default_rng(0).standard_normal((rows, weight.shape[1]), np.float32)
    ids = np.arange(rows) % ROWS
    product, looked_up = run(packed, x, ids)
    expected = x @ exact.T
    # activations are rounded to int8
    assert np.abs(product - expected).max() < 0.02 * np.abs(expected).max()
    assert np.array_equal(looked_up, exact[ids])


def run(
    packed: Packed, x: NDArray[np.float32], ids: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    n, k = packed.shape
    blocks = packed.scales.shape[1]
    numbers = packed.numbers.numpy()
    constants = {
        "b": numbers.reshape(n, blocks, -1),
        "table": numbers,
        "scales": packed.scales.numpy(),
    }
    if packed.zero_points is not None:
        constants["zeros"] = packed.zero_points.numpy()
    more = [name for name in ("scales", "zeros") if name in constants]
    sizes = {"bits": packed.bits, "block_size": packed.block_size}
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "b", *more],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            accuracy_level=4,
            **sizes,
        ),
        helper.make_node(
            "GatherBlockQuantized",
            ["table", "ids", *more],
            ["rows"],
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            **sizes,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["m"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["m", k]),
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    found: list[NDArray[np.float32]] = session.run(None, {"x": x, "ids": ids})
    return found
