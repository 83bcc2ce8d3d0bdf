"""Checkpoints: what safetensors wrote is read back exactly; anything broken is one line."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgekit.errors import EdgekitError
from edgekit.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header
from edgekit.models.config import ModelConfig
from edgekit.models.random_weights import RandomCheckpoint

Tensors = dict[str, torch.Tensor]

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "lfm2",
        "vocab_size": 32,
        "hidden_size": 16,
        "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "block_auto_adjust_ff_dim": False,
    }
)
EMBEDDING = "model.embed_tokens.weight"


def weights(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    source = RandomCheckpoint(CONFIG)
    return {name: source.tensor(name).to(dtype) for name in source.shapes()}


def save(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / SINGLE_FILE)
    return folder / SINGLE_FILE


def save_sharded(folder: Path, tensors: Tensors, shards: int = 3) -> Path:
    """Write shards and the index as transformers does."""
    names = sorted(tensors)
    places = dict[str, str]()
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / INDEX_FILE


def assert_same(checkpoint: Checkpoint, tensors: Tensors) -> None:
    assert checkpoint.shapes() == {name: tuple(value.shape) for name, value in tensors.items()}
    for name, value in tensors.items():
        read = checkpoint.tensor(name)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_single_file_reads_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path, weights(dtype))
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.validate(CONFIG)
    assert_same(checkpoint, weights(dtype))


def test_shards_read_back_exactly(tmp_path: Path) -> None:
    save_sharded(tmp_path, weights())
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.validate(CONFIG)
    assert_same(checkpoint, weights())


def test_shards_linked_out_of_their_folder_are_read(tmp_path: Path) -> None:
    """The hub's cache keeps the bytes elsewhere, under their hash, and links to them."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    save_sharded(folder, weights())
    for index, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(blobs / str(index))
        file.symlink_to(blobs / str(index))
    assert_same(Checkpoint.open(folder), weights())


def test_a_tensor_is_memory_of_its_own(tmp_path: Path) -> None:
    file = save(tmp_path, weights())
    tensor = Checkpoint.open(tmp_path).tensor(EMBEDDING)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) not in maps.read_text()
    tensor.zero_()  # neither shared with the file nor with the next reader
    assert torch.equal(Checkpoint.open(tmp_path).tensor(EMBEDDING), weights()[EMBEDDING])


def test_an_empty_tensor_and_a_scalar_are_read(tmp_path: Path) -> None:
    save(tmp_path, {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("empty").shape == (0, 4)
    assert checkpoint.tensor("scalar").item() == 2.5


def test_the_digest_follows_the_bytes(tmp_path: Path) -> None:
    one, two, shards = (tmp_path / name for name in ("one", "two", "shards"))
    for folder in (one, two, shards):
        folder.mkdir()
    save(one, weights())
    save(two, weights() | {"model.embedding_norm.weight": torch.full((16,), 2.0)})
    save_sharded(shards, weights())
    digests = {Checkpoint.open(folder).sha256() for folder in (one, two, shards)}
    assert len(digests) == 3
    assert Checkpoint.open(one).sha256() in digests
    assert all(len(digest) == 64 for digest in digests)


def without_norm(tensors: Tensors) -> None:
    del tensors["model.embedding_norm.weight"]


def with_extra(tensors: Tensors) -> None:
    tensors["model.layers.9.ffn_norm.weight"] = torch.ones(16)


def with_wrong_shape(tensors: Tensors) -> None:
    tensors["model.layers.0.conv.conv.weight"] = torch.ones(16, 3)


def with_different_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING] * 2


def without_most(tensors: Tensors) -> None:
    for name in list(tensors)[4:]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norm, "1 missing: model.embedding_norm.weight"),
        (with_extra, "1 unexpected: model.layers.9.ffn_norm.weight"),
        (
            with_wrong_shape,
            r"1 of the wrong shape: model.*conv.weight \(is \[16, 3\], should be \[16, 1, 3\]\)",
        ),
        (with_different_head, "lm_head.weight differs from model.embed_tokens.weight"),
        (without_most, r"\d+ missing: .*, .*, .*, \.\.\."),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = weights()
    change(tensors)
    save(tmp_path, tensors)
    with pytest.raises(EdgekitError, match=message) as caught:
        Checkpoint.open(tmp_path).validate(CONFIG)
    assert "\n" not in str(caught.value)


def test_a_tied_model_may_repeat_its_embedding(tmp_path: Path) -> None:
    save(tmp_path, weights() | {"lm_head.weight": weights()[EMBEDDING].clone()})
    Checkpoint.open(tmp_path).validate(CONFIG)


def test_a_repeated_head_without_an_embedding_is_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    save(tmp_path, tensors)
    with pytest.raises(EdgekitError, match=EMBEDDING):
        Checkpoint.open(tmp_path).validate(CONFIG)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    tensors = weights(dtype)
    tensors["model.layers.1.ffn_norm.weight"][11] = bad
    save(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.tensor("model.layers.0.ffn_norm.weight")
    with pytest.raises(EdgekitError, match="model.layers.1.ffn_norm.weight holds NaN or infinite"):
        checkpoint.tensor("model.layers.1.ffn_norm.weight")


def test_other_dtypes_are_refused_by_the_tensors_name(tmp_path: Path) -> None:
    save(tmp_path, {"codes": torch.zeros(4, dtype=torch.int8)})
    with pytest.raises(EdgekitError, match="tensor codes has dtype I8; supported: BF16, F16, F32"):
        Checkpoint.open(tmp_path)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    save(tmp_path, weights())
    with pytest.raises(EdgekitError, match="has no tensor nothing"):
        Checkpoint.open(tmp_path).tensor("nothing")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle is never loaded")
    with pytest.raises(EdgekitError, match="pytorch_model.bin, a pickle, .* is not loaded"):
        Checkpoint.open(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(EdgekitError, match="truncated" if size else "is empty"):
            Checkpoint.open(tmp_path)
    file.write_bytes(content + b"\0")
    with pytest.raises(EdgekitError, match="1 bytes follow the last tensor"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.ones(4), "b": torch.ones(4)})
    checkpoint = Checkpoint.open(tmp_path)
    os.truncate(file, file.stat().st_size - 20)
    with pytest.raises(EdgekitError, match="truncated while it was being read"):
        checkpoint.tensor("b")


def write_raw(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / SINGLE_FILE).write_bytes(prefix + text + data)
    return folder / SINGLE_FILE


def f32(begin: object, end: object, shape: object = (1,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": f32(0, 4), "b": f32(0, 4)}, 4, "tensor b overlaps another or leaves a gap"),
        ({"a": f32(0, 4), "b": f32(2, 6)}, 6, "overlaps another or leaves a gap"),
        ({"a": f32(0, 4), "b": f32(8, 12)}, 12, "tensor b overlaps another or leaves a gap"),
        ({"a": f32(4, 8)}, 8, "tensor a overlaps another or leaves a gap"),
        ({"a": f32(-4, 0)}, 4, "tensor a has impossible data_offsets"),
        ({"a": f32(4, 0)}, 4, "do not span its shape"),
        ({"a": f32(0, 8)}, 8, "do not span its shape"),
        ({"a": f32(0, 2**63, [2**61])}, 4, "tensor a has an impossible shape"),
        ({"a": f32(0, 0, [0, 2**62])}, 0, "tensor a has an impossible shape"),
        ({"a": f32(0, 4, [-1, -1])}, 4, "tensor a has an impossible shape"),
        ({"a": f32(0, 4, [True])}, 4, "tensor a has an impossible shape"),
        ({"a": f32(0, 4, [1] * 9)}, 4, "tensor a has an impossible shape"),
        ({"a": f32(0, 4.0)}, 4, "tensor a has impossible data_offsets"),
        ({"a": f32("0", 4)}, 4, "tensor a has impossible data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "needs dtype, shape and data_offsets"),
        ({"a": f32(0, 4) | {"more": 1}}, 4, "needs dtype, shape and data_offsets"),
        ({"a": f32(0, 4) | {"dtype": ["F32"]}}, 4, "has dtype"),
        ({"a": 1}, 4, "needs dtype, shape and data_offsets"),
        ({"a\n": f32(0, 8)}, 8, r"tensor 'a\\n'"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__ must hold strings"),
        ({"__metadata__": []}, 0, "__metadata__ must hold strings"),
        ([], 0, "not an object"),
        (b'{"a": 1, "a": 1}', 0, "a name stands twice"),
        (b'{"a": ' + b"[" * 100_000, 0, "corrupt safetensors header"),
        (b"\xff\xff", 0, "corrupt safetensors header"),
        (b"{", 0, "truncated|corrupt"),
        (b"", 0, "truncated, or not a safetensors file"),
    ],
)
def test_hostile_headers_are_refused(
    tmp_path: Path, header: object, data: int, message: str
) -> None:
    file = write_raw(tmp_path, header, bytes(data))
    with pytest.raises(EdgekitError, match=message) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 3, 2**31, 2**63, 2**64 - 1])
def test_hostile_header_lengths_are_refused(tmp_path: Path, length: int) -> None:
    file = write_raw(tmp_path, {}, length=length)
    with pytest.raises(EdgekitError, match="truncated, or not a safetensors file|corrupt"):
        read_header(file)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    file = save(folder, {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)})
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    try:
        checkpoint = Checkpoint.open(folder)
        for name, shape in checkpoint.shapes().items():
            assert tuple(checkpoint.tensor(name).shape) == shape
    except EdgekitError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model\n.safetensors",
        "pytorch_model.bin",
        "",
        7,
        None,
    ],
)
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, place: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(tmp_path, weights())
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {EMBEDDING: place}}))
    with pytest.raises(EdgekitError, match="is not the plain name of a safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(EdgekitError, match="weight_map is missing or empty"):
        Checkpoint.open(tmp_path)


def test_an_index_and_its_shards_must_agree(tmp_path: Path) -> None:
    index = save_sharded(tmp_path, weights())
    content = json.loads(index.read_text())
    places = content["weight_map"]

    index.write_text(json.dumps({"weight_map": places | {"more": places[EMBEDDING]}}))
    with pytest.raises(EdgekitError, match="1 missing from its shard: more"):
        Checkpoint.open(tmp_path)

    fewer = {name: place for name, place in places.items() if name != EMBEDDING}
    index.write_text(json.dumps({"weight_map": fewer}))
    with pytest.raises(EdgekitError, match=f"does not place tensor {EMBEDDING} in"):
        Checkpoint.open(tmp_path)

    index.write_text(json.dumps(content))
    (tmp_path / places[EMBEDDING]).unlink()
    with pytest.raises(EdgekitError, match=f"1 of 3 shards missing: {places[EMBEDDING]}: download"):
        Checkpoint.open(tmp_path)


def test_random_weights_are_deterministic_and_of_use() -> None:
    wide = ModelConfig.from_dict(
        CONFIG.to_dict() | {"vocab_size": 4096, "hidden_size": 256, "head_dim": 64}
    )
    source, again, other = (RandomCheckpoint(wide, seed) for seed in (0, 0, 1))
    assert source.shapes() == wide.tensor_shapes()
    assert source.sha256() == again.sha256() != other.sha256()
    for name, shape in source.shapes().items():
        tensor = source.tensor(name)
        assert tensor.shape == shape
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, again.tensor(name))
        assert tensor.isfinite().all()
    embedding = source.tensor(EMBEDDING).float()
    assert embedding.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert (
        torch.unique(embedding, dim=0).shape[0] == 4096
    )  # the block of 2^18 numbers recurs four times
    assert not torch.equal(embedding, other.tensor(EMBEDDING).float())
    first, second = (source.tensor(f"model.layers.{i}.feed_forward.w1.weight") for i in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(source.tensor("model.embedding_norm.weight"), torch.ones(256))
    with pytest.raises(EdgekitError, match="has no tensor nothing"):
        source.tensor("nothing")
