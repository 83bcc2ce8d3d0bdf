"""Small models of each family with random weights, and transformers' models of the same."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgekit.models.config import ModelConfig
from edgekit.models.tokenizer import BYTE_ALPHABET
from edgekit.quantize.names import HEAD

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "tie_word_embeddings": True,
}
_LLAMA = _SIZES | {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
_QWEN3 = _SIZES | {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "head_dim": 32,
}
_BANDS = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LFM2 = _SIZES | {
    "model_type": "lfm2",
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention", "conv"],
    "rope_theta": 10_000.0,
}

# As config.json may spell them. Frequencies of every band of the scaling are in 16 dimensions.
SMALL: dict[str, dict[str, Any]] = {
    "lfm2": _LFM2,
    "llama": _LLAMA,
    "llama-bands": {key: value for key, value in _LLAMA.items() if key != "rope_theta"}
    | {"rope_parameters": _BANDS, "tie_word_embeddings": False},
    "llama-biases": _LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-ungrouped": _LLAMA | {"num_key_value_heads": 4},
    "qwen3": _QWEN3,
    "qwen3-biases": _QWEN3 | {"attention_bias": True, "tie_word_embeddings": False},
}


def small_config(name: str) -> ModelConfig:
    """Return one of `SMALL`."""
    return ModelConfig.from_dict(SMALL[name])


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return bf16 values in float32; norms are not ones nor biases zeros: a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 0.2 * values + (0 if name.endswith(".bias") else 1)
        else:
            values = values / shape[-1] ** 0.5
        weights[name] = values.bfloat16().float()
    return weights


def theirs(config: ModelConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """Return transformers' model of the written config.json with these weights."""
    raw = json.loads(json.dumps(config.to_dict()))
    reference = AutoConfig.for_model(**raw)
    model = AutoModelForCausalLM.from_config(reference, attn_implementation="eager")
    lacking, extra = model.load_state_dict(weights, strict=False)
    assert set(lacking) <= {HEAD}
    assert not extra
    model.tie_weights()
    made: PreTrainedModel = model.float().eval()
    return made


def small_folder(name: str, place: Path, seed: int = 0) -> Path:
    """Write a model folder with its random weights and a tokenizer of single bytes."""
    place.mkdir(parents=True)
    config = small_config(name)
    weights = {key: value.bfloat16() for key, value in random_weights(config, seed).items()}
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(SMALL[name]))
    (place / "tokenizer.json").write_text(json.dumps(_tokenizer(SMALL[name])))
    return place


def _tokenizer(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json: the bytes from id 10 on, and one merge, which llama.cpp wants."""
    special = {"<bos>": raw["bos_token_id"], "<eos>": raw["eos_token_id"]}
    letters = {letter: 10 + i for i, letter in enumerate(BYTE_ALPHABET)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, "special": True, **flags} for text, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"trim_offsets": True},
        "post_processor": None,
        "decoder": byte_level | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": special | letters | {"th": 266},
            "merges": ["t h"],
        },
    }
