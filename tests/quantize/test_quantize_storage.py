"""The safetensors file of quantized tensors: round trip, size on disk, damage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgekit.errors import EdgekitError
from edgekit.quantize.affine import quantize
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.grid import Grid
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import Contents, load_quantized, save_quantized
from edgekit.quantize.tensor import QuantizedTensor


def contents() -> Contents:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    tensors: Contents = {
        name: quantize_weight(parse_scheme(name), weight) for name in ("w8", "w4", "w4g32", "w8g32")
    }
    tensors["w5g32"] = quantize_weight(parse_scheme("w5g32"), weight)
    tensors["w6g16"] = quantize_weight(parse_scheme("w6g16"), weight.reshape(-1)[:512].view(2, 256))
    tensors["affine"] = quantize(weight, Grid(4, symmetric=False), axis=1)
    tensors["three"] = quantize(weight[:, :13], Grid(3), axis=0)
    tensors["scalar"] = quantize(torch.tensor(0.3), Grid(4))
    tensors["codebook"] = QuantizedTensor(
        torch.randint(0, 4, (6, 7), dtype=torch.uint8),
        torch.ones(6),
        bits=2,
        axis=0,
        codebook=torch.randn(2, 4),
    )
    # A scale that bfloat16 cannot hold stays float32.
    tensors["odd"] = QuantizedTensor(
        torch.ones(2, 4, dtype=torch.int8), torch.full((2, 1), 0.1), group_size=4
    )
    tensors["norm"] = torch.randn(5)
    tensors["half"] = torch.randn(5, 2).bfloat16().t()
    return tensors


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, QuantizedTensor) and isinstance(right, QuantizedTensor):
        return all(same(getattr(left, key), getattr(right, key)) for key in vars(left))
    return type(left) is type(right) and left == right


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    written = contents()
    save_quantized(tmp_path / "q.safetensors", written)
    read = load_quantized(tmp_path / "q.safetensors")
    assert set(read) == set(written)
    assert {name for name in written if not same(written[name], read[name])} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


@pytest.mark.parametrize("name", [name for name in contents() if name != "odd"])
def test_the_file_takes_the_bytes_that_nbytes_says(tmp_path: Path, name: str) -> None:
    tensor = contents()[name]
    save_quantized(tmp_path / "q", {name: tensor})
    with safe_open(tmp_path / "q", framework="pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert stored == tensor.nbytes


def test_one_object_under_two_names_is_stored_once(tmp_path: Path) -> None:
    tensor = contents()["w4g32"]
    save_quantized(tmp_path / "q", {"embedding": tensor, "head": tensor})
    read = load_quantized(tmp_path / "q")
    assert read["head"] is read["embedding"]
    with safe_open(tmp_path / "q", framework="pt") as file:
        assert sorted(file.keys()) == ["embedding.codes", "embedding.scales"]


def test_colliding_names_are_refused(tmp_path: Path) -> None:
    tensor = contents()["w8"]
    with pytest.raises(ValueError, match=r"w.codes"):
        save_quantized(tmp_path / "q", {"w": tensor, "w.codes": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(EdgekitError, match="folder: cannot be written"):
        save_quantized(tmp_path / "folder", contents())
    (tmp_path / "file").touch()
    with pytest.raises(EdgekitError, match="file: cannot be made"):
        save_quantized(tmp_path / "file" / "q", contents())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def refused(path: Path) -> str:
    with pytest.raises(EdgekitError) as refusal:
        load_quantized(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q"
    assert "no such file" in refused(path)
    path.write_bytes(b"")
    refused(path)
    path.write_text("not safetensors at all")
    refused(path)
    save_file({"a": torch.ones(2)}, path)
    assert "no edgekit metadata" in refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q"
    save_quantized(path, {"w": contents()["w4g32"]})
    whole = path.read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


GOOD_ENTRY = {"shape": [2, 4], "bits": 4, "group_size": None, "axis": 0, "signed": True}


BAD_ENTRIES: list[object] = [
    [],
    None,
    7,
    "same_as",
    {},
    {"same_as": "absent"},
    {"same_as": "w"},
    {"same_as": ["w"]},
    {**GOOD_ENTRY, "extra": 1},
    {**GOOD_ENTRY, "shape": [2, 5]},
    {**GOOD_ENTRY, "shape": [3, 4]},
    {**GOOD_ENTRY, "shape": "24"},
    {**GOOD_ENTRY, "shape": []},
    {**GOOD_ENTRY, "shape": [2**62, 2**62]},
    {**GOOD_ENTRY, "shape": [2**80, 4]},
    {**GOOD_ENTRY, "shape": [-2, -4]},
    {**GOOD_ENTRY, "shape": [0, 4]},
    {**GOOD_ENTRY, "bits": 8},
    {**GOOD_ENTRY, "bits": 5},
    {**GOOD_ENTRY, "bits": "x"},
    {**GOOD_ENTRY, "bits": None},
    {**GOOD_ENTRY, "axis": 1},
    {**GOOD_ENTRY, "axis": "0"},
    {**GOOD_ENTRY, "axis": None, "group_size": 2},
    {**GOOD_ENTRY, "axis": None, "group_size": "2"},
    {**GOOD_ENTRY, "axis": None, "group_size": ""},
    {**GOOD_ENTRY, "axis": []},
]


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps({"format_version": 2, "tensors": {}}),
        json.dumps({"format_version": 1, "tensors": []}),
        json.dumps({"format_version": 1, "tensors": {"v": GOOD_ENTRY}}),
        *(json.dumps({"format_version": 1, "tensors": {"w": entry}}) for entry in BAD_ENTRIES),
    ],
    ids=lambda metadata: metadata[:90],
)
def test_metadata_that_contradicts_the_file_is_refused(tmp_path: Path, metadata: str) -> None:
    arrays = {"w.codes": torch.zeros(2, 2, dtype=torch.uint8), "w.scales": torch.ones(2)}
    good = json.dumps({"format_version": 1, "tensors": {"w": GOOD_ENTRY}})
    save_file(arrays, tmp_path / "good", metadata={"edgekit": good})
    assert load_quantized(tmp_path / "good")["w"].shape == (2, 4)
    save_file(arrays, tmp_path / "bad", metadata={"edgekit": metadata})
    refused(tmp_path / "bad")


def test_damaged_scales_are_refused_by_name(tmp_path: Path) -> None:
    tensor = contents()["w8"]
    assert isinstance(tensor, QuantizedTensor)
    save_quantized(tmp_path / "q", {"w": tensor})
    data = bytearray((tmp_path / "q").read_bytes())
    at = data.index(tensor.scales.numpy().tobytes())
    data[at : at + 4] = b"\xff\xff\xff\xff"  # NaN
    (tmp_path / "q").write_bytes(data)
    assert "w: scales must be positive and finite" in refused(tmp_path / "q")
