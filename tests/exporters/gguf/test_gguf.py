"""The GGUF target: the file that gguf-py reads holds the model, and llama.cpp's keys."""

import json
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
import torch
from support.gguf_models import job_of, small_model, write_gguf_of

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch import layout as executorch
from edgekit.exporters.gguf.architectures import find_architecture
from edgekit.exporters.gguf.layout import check_rows, stored_once
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.gguf.readback import weights
from edgekit.formats.gguf.file import GgufArray, GgufFile
from edgekit.formats.gguf.writer import PlannedTensor, write_gguf
from edgekit.models.catalogue import catalogue
from edgekit.models.random_weights import RandomCheckpoint
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.weights import floats
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.recipe import Recipe, Rule, resolve, uniform
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import parse_scheme

SCHEMES = ["w8", "w8g64", "w4", "w4g32", "w4g64", "w4g32a", "int8", "int4", "float"]


@pytest.fixture(scope="module")
def tiny() -> ModelSource:
    return resolve_model("lfm2-tiny")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gguf_py_reads_the_weights_bit_for_bit(
    tiny: ModelSource, tmp_path: Path, scheme: str
) -> None:
    path, job = write_gguf_of(tiny, scheme, tmp_path)
    stored = {tensor.name: tensor for tensor in peer.GGUFReader(path).tensors}
    once = stored_once(job.table)
    assert len(stored) == len(job.table) - len(once)
    for row in job.table:
        if row.tensor in once:
            continue
        tensor = stored[gguf_names(job.config)[row.tensor]]
        values = torch.from_numpy(peer.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = floats(job.weights[row.tensor])
        assert torch.equal(values.view(torch.int32), expected.view_as(values).view(torch.int32))


@pytest.mark.parametrize("scheme", ["int4", "w4g32a", "float"])
def test_weights_are_read_back_by_their_checkpoint_names(
    tiny: ModelSource, tmp_path: Path, scheme: str
) -> None:
    path, job = write_gguf_of(tiny, scheme, tmp_path)
    found = dict(weights(path, tiny.config))
    assert list(found) == [row.tensor for row in job.table if row.tensor != HEAD]
    for name, values in found.items():
        assert values.dtype == torch.float32
        assert torch.equal(values, floats(job.weights[name]))


def test_weights_of_another_model_are_refused(tiny: ModelSource, tmp_path: Path) -> None:
    path, _ = write_gguf_of(tiny, "int8", tmp_path)
    other = resolve_model(str(small_model(tmp_path / "small"))).config
    with pytest.raises(EdgekitError, match="'token_embd.weight' of shape .* is none of"):
        list(weights(path, other))


@pytest.mark.parametrize(
    ("scheme", "types"),
    [
        ("int8", {"Q8_0", "F32"}),
        ("int4", {"Q8_0", "Q4_0", "F32"}),
        ("w4g32a", {"Q8_0", "Q4_1", "F32"}),
        ("float", {"BF16", "F32"}),
    ],
)
def test_types(tiny: ModelSource, tmp_path: Path, scheme: str, types: set[str]) -> None:
    file = GgufFile.open(write_gguf_of(tiny, scheme, tmp_path)[0])
    assert {tensor.type for tensor in file.tensors.values()} == types
    for tensor in file.tensors.values():
        if "norm" in tensor.name or "shortconv.conv" in tensor.name:
            assert tensor.type == "F32"
    assert file.tensors["blk.0.shortconv.conv.weight"].shape == (256, 3)
    expected = {"int8": 7, "int4": 2, "w4g32a": 3, "float": 32}  # enum llama_ftype
    assert file.metadata["general.file_type"] == expected[scheme]


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, "F16"), (torch.float32, "F32"), (torch.bfloat16, "BF16")]
)
def test_floats_stay_what_the_checkpoint_has(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    source = resolve_model(str(small_model(tmp_path / "small", dtype)))
    file = GgufFile.open(write_gguf_of(source, "float", tmp_path)[0])
    assert file.tensors["token_embd.weight"].type == kind
    assert file.tensors["blk.1.attn_norm.weight"].type == "F32"


def test_metadata(tmp_path: Path) -> None:
    source = resolve_model(str(small_model(tmp_path / "small")))
    path, job = write_gguf_of(source, "int8", tmp_path)
    fields = peer.GGUFReader(path).fields
    found = {key: field.contents() for key, field in fields.items() if "tokenizer" not in key}
    assert {key: value for key, value in found.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "lfm2",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "lfm2.vocab_size": 4100,
        "lfm2.context_length": 128,
        "lfm2.embedding_length": 64,
        "lfm2.block_count": 2,
        "lfm2.feed_forward_length": 96,
        "lfm2.attention.head_count": 4,
        "lfm2.attention.head_count_kv": [0, 2],
        "lfm2.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "lfm2.rope.freq_base": 12345.0,
        "lfm2.shortconv.l_cache": 3,
    }
    assert found["GGUF.version"] == 3
    assert job.config.rope.theta == 12345.0


def test_the_tokenizer_is_that_of_the_model(tiny: ModelSource, tmp_path: Path) -> None:
    path, _ = write_gguf_of(tiny, "int8", tmp_path)
    assert tiny.folder is not None
    raw = json.loads((tiny.folder / "tokenizer.json").read_text())
    found = {k: f.contents() for k, f in peer.GGUFReader(path).fields.items() if "tokenizer" in k}
    tokens = found.pop("tokenizer.ggml.tokens")
    assert {text: i for i, text in enumerate(tokens)} == raw["model"]["vocab"]
    kinds = found.pop("tokenizer.ggml.token_type")
    special = {token["id"] for token in raw["added_tokens"]}
    assert [i for i, kind in enumerate(kinds) if kind == peer.TokenType.CONTROL] == sorted(special)
    assert set(kinds) == {peer.TokenType.CONTROL, peer.TokenType.NORMAL}
    merges = [" ".join(pair) for pair in raw["model"]["merges"]]
    assert found.pop("tokenizer.ggml.merges") == merges
    template = (tiny.folder / "chat_template.jinja").read_text()
    assert found == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "lfm2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template,
    }


def test_ids_without_a_token_and_a_second_end(tmp_path: Path) -> None:
    source = resolve_model(str(small_model(tmp_path / "small")))
    file = GgufFile.open(write_gguf_of(source, "int8", tmp_path)[0])
    assert file.array("tokenizer.ggml.tokens").strings()[4096:] == [
        "[PAD4096]",
        "[PAD4097]",
        "[PAD4098]",
        "[PAD4099]",
    ]
    assert file.array("tokenizer.ggml.token_type").numbers()[4096:].tolist() == [5] * 4
    assert file.metadata["tokenizer.ggml.eos_token_id"] == 7
    assert file.metadata["tokenizer.ggml.eot_token_id"] == 2


def test_random_weights_get_a_tokenizer_that_says_so(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "small", tokenizer=False)
    source = resolve_model(str(folder), random_weights=True)
    file = GgufFile.open(write_gguf_of(source, "int8", tmp_path)[0])
    assert "stand-in" in file.metadata["general.description"]
    tokens = file.array("tokenizer.ggml.tokens").strings()
    assert len(set(tokens)) == 4100
    assert tokens[1] == "<|1|>"


@pytest.mark.parametrize(
    ("rules", "head", "table"),
    [
        ([Rule(".*", parse_scheme("w8"))], None, "Q8_0"),
        (
            [Rule("lm_head.*", parse_scheme("w4g32")), Rule(".*", parse_scheme("w8"))],
            "Q4_0",
            "Q8_0",
        ),
        ([Rule("lm_head.*", FLOAT), Rule(".*", parse_scheme("w8"))], "BF16", "Q8_0"),
        ([Rule("lm_head.*", parse_scheme("w8")), Rule(".*", FLOAT)], "Q8_0", "BF16"),
        ([Rule(".*", FLOAT)], None, "BF16"),
    ],
)
def test_a_tied_head_is_stored_once_where_it_is_the_table(
    tiny: ModelSource, tmp_path: Path, rules: list[Rule], head: str | None, table: str
) -> None:
    path, job = write_gguf_of(tiny, Recipe(tuple(rules)), tmp_path)
    file = GgufFile.open(path)
    assert file.tensors["token_embd.weight"].type == table
    stored = file.tensors.get("output.weight")
    assert (stored.type if stored else None) == head
    assert stored_once(job.table) == ([] if head else [HEAD])
    found = dict(weights(path, tiny.config))
    assert torch.equal(found.get(HEAD, found[EMBEDDING]), floats(job.weights[HEAD]))


def test_an_untied_head_is_stored(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "small", tie_word_embeddings=False)
    path, job = write_gguf_of(resolve_model(str(folder)), "int8", tmp_path)
    found = dict(weights(path, job.config))
    assert torch.equal(found[HEAD], floats(job.weights[HEAD]))
    assert not torch.equal(found[HEAD], found[EMBEDDING])


@pytest.mark.parametrize("model", [name for name in catalogue() if name != "lfm2-tiny"])
def test_every_model_of_the_catalogue_has_a_place_for_each_tensor(model: str) -> None:
    config = resolve_model(model, random_weights=True).config
    shapes, _ = config.tied_shapes()
    for scheme in ("w8", "w4g32", "w4g32a"):
        check_rows(resolve(uniform(parse_scheme(scheme)), shapes))
    names = gguf_names(config)
    assert names.keys() == shapes.keys()
    assert len(set(names.values())) == len(names)
    architecture = peer.MODEL_ARCH[find_architecture(config).name.upper()]
    known = set(peer.MODEL_TENSORS[architecture])
    patterns = {peer.TENSOR_NAMES[kind] for kind in known}
    stems = {name.removesuffix(".weight") for name in names.values()}
    for stem in stems:
        head, _, rest = stem.partition(".")
        number = rest.partition(".")[0]
        general = stem.replace(f"blk.{number}.", "blk.{bid}.") if head == "blk" else stem
        assert general in patterns, stem


def test_what_a_block_cannot_hold_is_refused_beforehand(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "small", intermediate_size=80)
    source = resolve_model(str(folder))
    with pytest.raises(EdgekitError, match=r"w2.weight: target gguf cannot hold w8 in rows of 80"):
        job_of(source, "w8")
    job_of(source, "float")


def test_a_model_whose_heads_are_wider_than_it_is_refused(tmp_path: Path) -> None:
    source = resolve_model(str(small_model(tmp_path / "small", head_dim=32)))
    with pytest.raises(EdgekitError, match="q_proj.weight: has 128 rows"):
        job_of(source, "float")


def test_xnnpack_refuses_zero_points_beforehand(tiny: ModelSource) -> None:
    shapes, _ = tiny.config.tied_shapes()
    rows = resolve(uniform(parse_scheme("w4g32a")), shapes)
    with pytest.raises(EdgekitError, match="cannot hold w4g32a: XNNPACK takes no zero points"):
        executorch.check_rows(rows)


def test_only_one_tensor_is_in_memory(tiny: ModelSource, tmp_path: Path) -> None:
    """The float weights are asked for in the file's order, each once."""
    asked = []

    class Watched(RandomCheckpoint):
        def tensor(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().tensor(name)

    source = ModelSource("watched", None, tiny.config, None, random_weights=True)
    source.__dict__["checkpoint"] = Watched(tiny.config)
    write_gguf_of(source, "float", tmp_path)
    assert asked == list(tiny.config.tensor_shapes())


def test_a_file_is_written_alike_each_time(tiny: ModelSource, tmp_path: Path) -> None:
    first, _ = write_gguf_of(tiny, "int4", tmp_path / "a")
    second, _ = write_gguf_of(tiny, "int4", tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_data_of_another_length_are_refused(tmp_path: Path) -> None:
    planned = [PlannedTensor("n", "F32", (4,))]
    with pytest.raises(ValueError, match="n: its data are not those of F32"):
        write_gguf(tmp_path / "f", {}, planned, lambda _: [np.zeros(8, np.uint8)])


def test_values_of_every_kind_are_read_by_gguf_py(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "general.architecture": "é",
        "a.flag": True,
        "a.number": 4_000_000_000,
        "a.ratio": 0.25,
        "a.words": ["", "zwei", "三"],
        "a.numbers": np.array([-5, 5], np.int32),
    }
    write_gguf(tmp_path / "f", values, [], lambda _: [])
    fields = peer.GGUFReader(tmp_path / "f").fields
    file = GgufFile.open(tmp_path / "f")
    for key, value in values.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        assert fields[key].contents() == plain
        own = file.metadata[key]
        if isinstance(own, GgufArray):
            own = own.strings() if own.type == 8 else own.numbers().tolist()
        assert own == plain
