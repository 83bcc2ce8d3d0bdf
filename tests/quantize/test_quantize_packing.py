"""Bit packing: the documented layout, and that nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.quantize.packing import pack, unpack
from edgekit.quantize.schemes.sizes import packed_size


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    signed=st.booleans(),
    columns=st.integers(1, 40),
    leading=st.lists(st.integers(1, 3), max_size=2),
    seed=st.integers(0, 2**31),
)
def test_unpack_undoes_pack(
    bits: int, signed: bool, columns: int, leading: list[int], seed: int
) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, low + (1 << bits), (*leading, columns), generator=generator)
    codes = values.to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, packed_size(columns, bits))
    assert torch.equal(unpack(packed, bits, columns, signed), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_are_little_endian_bit_streams(bits: int) -> None:
    codes = (torch.arange(13) * 7 % (1 << bits)).to(torch.uint8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    expected = list(stream.to_bytes(packed_size(13, bits), "little"))
    assert pack(codes, bits).tolist() == expected


def test_even_values_of_four_bits_are_low_nibbles() -> None:
    codes = torch.tensor([[-8, 7, -1]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0x78, 0x0F]]


def test_packing_leaves_its_input_alone() -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.int8)
    pack(codes, 8)[0] = 9
    assert codes.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (torch.zeros(4, dtype=torch.int8), 7),
        (torch.zeros(4, dtype=torch.int32), 4),
        (torch.zeros((), dtype=torch.int8), 4),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: torch.Tensor, bits: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        pack(codes, bits)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 2 bytes"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 4, signed=True)
