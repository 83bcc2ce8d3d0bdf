"""QuantizedTensor: validation, exact dequantization, sizes."""

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.quantize.tensor import CHUNK_ELEMENTS, QuantizedTensor


def codes_of(*shape: int, bits: int = 8, signed: bool = True, seed: int = 0) -> torch.Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, low + (1 << bits), shape, generator=generator)
    return values.to(torch.int8 if signed else torch.uint8)


def scales_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def in_numpy(tensor: QuantizedTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(codes - zero_points) * scales in float64, rounded once to float32."""
    codes = tensor.codes.numpy().astype(np.float64)
    scales = tensor.scales.numpy().astype(np.float64)
    zeros = 0.0 if tensor.zero_points is None else tensor.zero_points.numpy().astype(np.float64)
    if tensor.group_size is not None:
        scales = np.repeat(scales, tensor.group_size, axis=-1)
        zeros = np.repeat(zeros, tensor.group_size, axis=-1) if np.ndim(zeros) else zeros
    elif tensor.axis is not None:
        shape = [-1 if i == tensor.axis else 1 for i in range(codes.ndim)]
        scales = scales.reshape(shape)
        zeros = zeros.reshape(shape) if isinstance(zeros, np.ndarray) else zeros
    # Codes of 8 bits times float32: exact in float64, so this is the single rounding.
    result: np.ndarray[Any, np.dtype[np.float32]] = ((codes - zeros) * scales).astype(np.float32)
    return result


@pytest.mark.parametrize(
    ("shape", "scales", "axis", "group"),
    [
        ((6, 8), (), None, None),
        ((6, 8), (6,), 0, None),
        ((6, 8), (8,), 1, None),
        ((4, 3, 5), (3,), 1, None),
        ((6, 8), (6, 2), None, 4),
        ((2, 3, 8), (2, 3, 4), None, 2),
        ((8,), (2,), None, 4),
        ((), (), None, None),
        ((1, 8), (1,), 0, None),
    ],
)
@pytest.mark.parametrize("zeroed", [False, True])
def test_dequantize_rounds_once(
    shape: tuple[int, ...],
    scales: tuple[int, ...],
    axis: int | None,
    group: int | None,
    zeroed: bool,
) -> None:
    zeros = codes_of(*scales, signed=False, seed=2).to(torch.int32) if zeroed else None
    tensor = QuantizedTensor(
        codes_of(*shape, signed=not zeroed),
        scales_of(*scales),
        zero_points=zeros,
        axis=axis,
        group_size=group,
    )
    restored = tensor.dequantize()
    assert restored.dtype == torch.float32
    np.testing.assert_array_equal(restored.numpy(), in_numpy(tensor))


@pytest.mark.parametrize(("axis", "group"), [(None, None), (0, None), (1, None), (None, 32)])
def test_large_tensors_are_decoded_in_pieces_alike(axis: int | None, group: int | None) -> None:
    rows, columns = 3 * CHUNK_ELEMENTS // 1024 + 5, 1024
    shapes = {None: (), 0: (rows,), 1: (columns,)}
    scales = scales_of(*((rows, columns // 32) if group else shapes[axis]))
    tensor = QuantizedTensor(codes_of(rows, columns), scales, axis=axis, group_size=group)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), in_numpy(tensor))


@pytest.mark.parametrize(("scales", "group"), [((), None), ((CHUNK_ELEMENTS // 16,), 32)])
def test_long_vectors_are_decoded_alike(scales: tuple[int, ...], group: int | None) -> None:
    tensor = QuantizedTensor(codes_of(2 * CHUNK_ELEMENTS), scales_of(*scales), group_size=group)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), in_numpy(tensor))


@pytest.mark.parametrize(("scales", "axis", "group"), [((6,), 0, None), ((6, 2), None, 4)])
def test_transposed_codes_are_decoded_alike(
    scales: tuple[int, ...], axis: int | None, group: int | None
) -> None:
    tensor = QuantizedTensor(codes_of(8, 6).t(), scales_of(*scales), axis=axis, group_size=group)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), in_numpy(tensor))


def test_dequantize_leaves_codes_and_parameters_alone() -> None:
    zeros = torch.full((6,), 3, dtype=torch.int32)
    tensor = QuantizedTensor(codes_of(6, 8, signed=False), scales_of(6), zeros, axis=0)
    before = tensor.codes.clone(), tensor.scales.clone(), zeros.clone()
    first, second = tensor.dequantize(), tensor.dequantize()
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, (tensor.codes, tensor.scales, zeros)))


def test_dequantize_to_bfloat16_is_one_rounding() -> None:
    tensor = QuantizedTensor(codes_of(64, 8), scales_of(64).bfloat16().float(), axis=0)
    exact = tensor.codes.double() * tensor.scales.double()[:, None]
    assert torch.equal(tensor.dequantize(torch.bfloat16), exact.to(torch.bfloat16))


@pytest.mark.parametrize("books", [None, 1, 2, 6])
def test_a_codebook_is_looked_up(books: int | None) -> None:
    codes = codes_of(6, 8, bits=3, signed=False)
    codebook = torch.randn(*(() if books is None else (books,)), 8)
    scales = scales_of(6)
    tensor = QuantizedTensor(codes, scales, bits=3, axis=0, codebook=codebook)
    restored = tensor.dequantize()
    for row in range(6):
        book = codebook if books is None else codebook[row // (6 // books)]
        expected = torch.stack([book[code] for code in codes[row].tolist()]) * scales[row]
        assert torch.equal(restored[row], expected)
    assert tensor.nbytes == 6 * 3 + 6 * 4 + codebook.numel() * 4


@pytest.mark.parametrize("books", [None, 3])
def test_large_codebook_tensors_are_decoded_in_pieces_alike(books: int | None) -> None:
    rows, columns = 3 * 200, 1024
    codes = codes_of(rows, columns, bits=2, signed=False)
    codebook = torch.randn(*(() if books is None else (books,)), 4)
    tensor = QuantizedTensor(codes, torch.ones(()), bits=2, codebook=codebook)
    index = codes.long()
    expected = (
        codebook[index] if books is None else codebook.repeat_interleave(200, 0).gather(1, index)
    )
    assert torch.equal(tensor.dequantize(), expected)


def test_nbytes_counts_packed_codes_and_scales() -> None:
    four = codes_of(4, 64, bits=4)
    assert QuantizedTensor(four, scales_of(4, 2), bits=4, group_size=32).nbytes == 128 + 2 * 8
    assert QuantizedTensor(four, scales_of(4), bits=4, axis=0).nbytes == 128 + 4 * 4
    zeros = torch.zeros(4, dtype=torch.int32)
    assert QuantizedTensor(codes_of(4, 64), scales_of(4), zeros, axis=0).nbytes == 256 + 16 + 4


GOOD: dict[str, Any] = {"codes": codes_of(4, 8, bits=4), "scales": scales_of(4), "axis": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits must be"),
        ({"bits": 6}, "6-bit codes are int8 in groups of 16"),
        ({"codes": torch.zeros(4, 8, dtype=torch.int32)}, "codes must be int8 or uint8"),
        ({"codes": torch.zeros(0, 8, dtype=torch.int8)}, "must not be empty"),
        ({"codes": torch.full((4, 8), 8, dtype=torch.int8), "bits": 4}, r"lie in \[-8, 7\]"),
        ({"scales": scales_of(5)}, "scales must be float32 of shape"),
        ({"scales": scales_of(4).double()}, "scales must be float32"),
        ({"scales": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "positive and finite"),
        ({"scales": torch.tensor([1.0, -1.0, 1.0, 1.0])}, "positive and finite"),
        ({"scales": torch.tensor([1.0, torch.inf, 1.0, 1.0])}, "positive and finite"),
        ({"scales": torch.tensor([1.0, torch.nan, 1.0, 1.0])}, "positive and finite"),
        ({"axis": 2}, "axis must be 0 to 1"),
        ({"axis": 0, "group_size": 4}, "exclude each other"),
        ({"axis": None, "group_size": 3}, "group size 3 does not divide"),
        ({"axis": None, "group_size": 0}, "group size 0 does not divide"),
        ({"zero_points": torch.zeros(3, dtype=torch.int32)}, "zero_points must be int32"),
        ({"zero_points": torch.zeros(4)}, "zero_points must be int32"),
        ({"zero_points": torch.full((4,), 200, dtype=torch.int32)}, "zero_points must lie"),
        ({"codebook": torch.zeros(16), "bits": 4}, "must be uint8"),
    ],
)
def test_contradictory_fields_are_refused(change: dict[str, Any], message: str) -> None:
    QuantizedTensor(**GOOD)
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        (torch.zeros(8), r"codebook must be \[16\]"),
        (torch.zeros(3, 16), "3 codebooks must divide"),
        (torch.full((16,), torch.nan), "finite"),
        (torch.zeros(16).double(), "float32"),
    ],
)
def test_bad_codebooks_are_refused(codebook: torch.Tensor, message: str) -> None:
    codes = codes_of(4, 8, bits=4, signed=False)
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(codes, scales_of(4), bits=4, axis=0, codebook=codebook)


def test_a_codebook_has_no_zero_points() -> None:
    codes, zeros = codes_of(4, 8, bits=4, signed=False), torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="no zero_points"):
        QuantizedTensor(codes, scales_of(4), zeros, 4, axis=0, codebook=torch.zeros(16))
