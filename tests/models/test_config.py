"""ModelConfig: every public spelling reads to the same model, contradictions are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig
from edgekit.models.families.lfm2 import Lfm2Config

SIXTEEN = [2, 5, 8, 10, 12, 14]
PUBLIC = {
    "350M": (1024, 16, SIXTEEN, 16, 6656, True, 4608, 354_483_968),
    "700M": (1536, 16, SIXTEEN, 24, 10240, True, 6912, 742_489_344),
    "1.2B": (2048, 16, SIXTEEN, 32, 12288, True, 8192, 1_170_340_608),
    "2.6B": (2048, 30, [2, 5, 9, 13, 17, 21, 24, 27], 32, 10752, False, 10752, 2_569_272_320),
    "230M": (1024, 14, [2, 4, 6, 8, 10, 12], 16, 2560, False, 2560, 229_693_184),
}


def older(name: str) -> dict[str, Any]:
    """Build a config.json in the spelling of mid 2025."""
    hidden, layers, attention, heads, width, adjust, _, _ = PUBLIC[name]
    return {
        "model_type": "lfm2",
        "vocab_size": 65536,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "full_attn_idxs": attention,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "block_ff_dim": width,
        "block_auto_adjust_ff_dim": adjust,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "block_norm_eps": 1e-5,
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "conv_bias": False,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 128000,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "tie_embedding": True,
    }


def newer(name: str) -> dict[str, Any]:
    """Build the same file in the spelling of transformers 5."""
    raw = older(name)
    attention = raw.pop("full_attn_idxs")
    layers = raw["num_hidden_layers"]
    raw["layer_types"] = ["full_attention" if i in attention else "conv" for i in range(layers)]
    raw["intermediate_size"] = raw.pop("block_ff_dim")
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}
    raw["tie_word_embeddings"] = raw.pop("tie_embedding")
    del raw["block_norm_eps"]
    return raw


def changed(**changes: object) -> dict[str, Any]:
    """Return the newer 350M file with some keys replaced; None removes one."""
    raw = newer("350M") | changes
    return {key: value for key, value in raw.items() if value is not None}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_have_their_published_sizes(name: str) -> None:
    config = ModelConfig.from_dict(older(name))
    assert config.intermediate_size == PUBLIC[name][6]
    assert config.parameter_count == PUBLIC[name][7]
    assert config.head_dim == 64
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (7,), 0)


@pytest.mark.parametrize("name", PUBLIC)
def test_all_spellings_read_to_the_same_model(name: str) -> None:
    config = ModelConfig.from_dict(older(name))
    assert ModelConfig.from_dict(newer(name)) == config
    assert ModelConfig.from_dict(older(name) | newer(name)) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_eos_may_be_a_list_and_pad_null() -> None:
    config = ModelConfig.from_dict(
        newer("350M") | {"eos_token_id": [7, 2, 7], "pad_token_id": None}
    )
    assert config.eos_ids == (7, 2)
    assert config.pad_id is None


def test_an_untied_head_is_a_tensor_of_its_own() -> None:
    tied = ModelConfig.from_dict(changed())
    untied = ModelConfig.from_dict(changed(tie_word_embeddings=False))
    assert "lm_head.weight" not in tied.tensor_shapes()
    assert untied.tensor_shapes()["lm_head.weight"] == (65536, 1024)
    assert untied.parameter_count == tied.parameter_count + 65536 * 1024


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 4608),
        ({"block_ffn_dim_multiplier": 1.3}, 5888),
        ({"block_multiple_of": 1}, 4437),
        ({"block_auto_adjust_ff_dim": False}, 6656),
    ],
)
def test_feed_forward_rule(keys: dict[str, Any], width: int) -> None:
    assert ModelConfig.from_dict(changed(**keys)).intermediate_size == width


def test_a_null_multiplier_switches_the_rounding_off() -> None:
    raw = newer("350M") | {"block_ffn_dim_multiplier": None}
    assert ModelConfig.from_dict(raw).intermediate_size == int(2 * 6656 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "lfm2_moe"}, "mixture of experts; only dense text models"),
        (
            {"model_type": "lfm3"},
            "model_type 'lfm3' is not supported; supported: lfm2, llama, qwen3",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "65536"}, "vocab_size must be an integer, not '65536'"),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer, not True"),
        ({"hidden_size": 1024.0}, "hidden_size must be an integer"),
        ({"hidden_size": 0}, "hidden_size must lie between"),
        ({"hidden_size": -1024}, "hidden_size must lie between"),
        ({"hidden_size": 10**400}, "hidden_size must lie between .* a huge integer"),
        ({"vocab_size": 10**9}, "vocab_size must lie between"),
        ({"intermediate_size": None}, "intermediate_size or block_ff_dim is missing"),
        ({"block_ff_dim": 6657}, "intermediate_size 6656 contradicts block_ff_dim 6657"),
        ({"block_multiple_of": 0}, "block_multiple_of"),
        ({"block_ffn_dim_multiplier": -1.0}, "block_ffn_dim_multiplier"),
        ({"block_ffn_dim_multiplier": "1"}, "block_ffn_dim_multiplier must be a finite number"),
        ({"block_auto_adjust_ff_dim": 1}, "block_auto_adjust_ff_dim must be true or false"),
        ({"layer_types": None}, "layer_types or full_attn_idxs is missing"),
        ({"layer_types": ["conv"] * 15}, "layer_types has 15 entries but num_hidden_layers is 16"),
        ({"layer_types": ["mamba"] * 16}, r"layer_types\[0\] is 'mamba'; supported: conv, full_"),
        ({"layer_types": "conv"}, "layer_types must be a list"),
        ({"layer_types": [["conv"]] * 16}, "layer_types must be a list of names"),
        ({"full_attn_idxs": [1]}, "layer_types contradicts full_attn_idxs"),
        ({"full_attn_idxs": [16]}, "full_attn_idxs names layer 16; the model has layers 0 to 15"),
        ({"full_attn_idxs": [2, 2]}, "full_attn_idxs names a layer twice"),
        ({"full_attn_idxs": [True]}, "full_attn_idxs must be a list of integers"),
        ({"num_attention_heads": 7}, "hidden_size 1024 is not a multiple of num_attention_heads 7"),
        ({"num_key_value_heads": 6}, "16 is not a multiple of num_key_value_heads 6"),
        ({"num_key_value_heads": 32}, "num_key_value_heads must lie between 1 and 16"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"conv_bias": True}, "conv_bias true is not supported"),
        ({"conv_L_cache": 1}, "conv_L_cache must lie between 2 and 64"),
        ({"norm_eps": 0.0}, "norm_eps must lie between"),
        ({"norm_eps": float("nan")}, "norm_eps must be a finite number"),
        ({"block_norm_eps": 1e-6}, "norm_eps 1e-05 contradicts block_norm_eps 1e-06"),
        ({"tie_embedding": False}, "tie_word_embeddings True contradicts tie_embedding False"),
        ({"rope_theta": 5e5}, "rope_theta 500000 contradicts rope_parameters.rope_theta 1e.06"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type 'linear' is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters must be a table"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"eos_token_id": []}, "eos_token_id is missing or empty"),
        ({"eos_token_id": 7.0}, "eos_token_id must be a token id"),
        ({"eos_token_id": [65536]}, "eos_token_id 65536 lies outside the vocabulary of 65536"),
        ({"bos_token_id": -1}, "bos_token_id must lie between"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must lie between"),
        ({"intermediate_size": 1 << 20, "hidden_size": 1 << 20}, "is not an edge model"),
    ],
)
def test_mistakes_are_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EdgekitError, match=message) as caught:
        ModelConfig.from_dict(changed(**changes))
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(older("350M") | newer("350M"))), JSON)
def test_any_value_of_any_key_is_read_or_refused(key: str, value: object) -> None:
    try:
        config = ModelConfig.from_dict(older("350M") | {key: value})
    except EdgekitError as error:
        assert len(str(error)) < 250
        assert "\n" not in str(error)
    else:
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: its download did not finish"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff\xfe{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(EdgekitError, match=f"{file}: {message}"):
        load_json_object(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="config.json: cannot be read: No such file"):
        ModelConfig.load(tmp_path / "config.json")


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed(hidden_size=0)))
    with pytest.raises(EdgekitError, match=f"^{tmp_path}/config.json: hidden_size must lie"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("generation", "bos", "eos"),
    [
        ({"bos_token_id": 3, "eos_token_id": [7, 9]}, 3, (7, 9)),
        ({"eos_token_id": 9}, 1, (9,)),
        ({"eos_token_id": None, "temperature": 0.3}, 1, (7,)),
    ],
)
def test_ids_are_those_of_generation_config_where_it_names_them(
    tmp_path: Path, generation: dict[str, Any], bos: int, eos: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed()))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = ModelConfig.load(tmp_path)
    assert (config.bos_id, config.eos_ids) == (bos, eos)
    assert ModelConfig.load(tmp_path / "config.json").eos_ids == (7,)


@pytest.mark.parametrize(
    ("value", "words"),
    [("7", "must be a token id or a list"), ([7, 65536], "65536 is outside the vocabulary")],
)
def test_a_mistake_in_generation_config_names_that_file(
    tmp_path: Path, value: object, words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(EdgekitError, match=f"^{tmp_path}/generation_config.json: eos_.*{words}"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("raw", [older("350M"), newer("350M"), newer("2.6B")])
def test_shapes_are_those_of_transformers(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    # as from a file: transformers takes over and changes what it is given
    reference = transformers.Lfm2Config(**json.loads(json.dumps(raw)))
    config = ModelConfig.from_dict(raw)
    with torch.device("meta"):
        model = transformers.Lfm2ForCausalLM(reference)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes.pop("lm_head.weight")  # tied
    assert shapes == config.tensor_shapes()
    assert reference.rope_parameters["rope_theta"] == config.rope.theta
    assert reference.norm_eps == config.norm_eps
    assert isinstance(config, Lfm2Config)
    assert tuple(reference.layer_types) == config.layer_types


def test_transformers_reads_what_to_dict_writes() -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_dict(changed(tie_word_embeddings=False, eos_token_id=[7, 2]))
    with torch.device("meta"):
        model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**config.to_dict()))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == config.tensor_shapes()
