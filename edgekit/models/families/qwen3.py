"""Qwen3, dense text models: queries and keys are normalised head by head.

The spellings are those of transformers' `Qwen3Config`
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/qwen3). Heads times
head_dim need not be the model's width.
"""

from dataclasses import dataclass
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.models.architecture import Architecture
from edgekit.models.config import ModelConfig
from edgekit.models.config_keys import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Keys,
    read_rope,
    show,
    token_ids,
)
from edgekit.models.plain_decoder import (
    plain_architecture,
    read_pad_id,
    refuse_other_activations,
    write_shared,
)

_HEAD_DIM = 128  # what transformers takes where the file does not say
_FULL_ATTENTION = "full_attention"


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(ModelConfig):
    """A model of the family: whether the linears of its attention have biases."""

    attention_bias: bool


def read(keys: Keys) -> Qwen3Config:
    """Read a config.json; one without bos, as the tokenizer adds none, gets its first eos."""
    refuse_other_activations(keys)
    _refuse_windows(keys)
    heads = keys.integer("num_attention_heads", high=MAX_WIDTH)
    eos = token_ids(keys.raw.get("eos_token_id"), "eos_token_id")
    return Qwen3Config(
        family="qwen3",
        vocab_size=keys.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=keys.integer("hidden_size", high=MAX_WIDTH),
        num_layers=keys.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", high=MAX_WIDTH, default=heads),
        head_dim=keys.integer("head_dim", high=MAX_WIDTH, default=_HEAD_DIM),
        intermediate_size=keys.integer("intermediate_size", high=MAX_WIDTH),
        max_context=keys.integer("max_position_embeddings", default=32_768, high=MAX_CONTEXT),
        bos_id=keys.integer("bos_token_id", default=[*eos, 0][0], low=0, high=MAX_VOCAB),
        eos_ids=eos,
        pad_id=read_pad_id(keys),
        norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope=read_rope(keys, theta=10_000.0),
        tie_embeddings=keys.flag("tie_word_embeddings", default=False),
        attention_bias=keys.flag("attention_bias", default=False),
    )


def write(config: Qwen3Config) -> dict[str, Any]:
    """Return the keys of transformers' `Qwen3Config`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **write_shared(config),
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "attention_bias": config.attention_bias,
        "use_sliding_window": False,
    }


def architecture(config: Qwen3Config) -> Architecture:
    """Return the blocks."""
    bias = config.attention_bias
    return plain_architecture(config, head_norms=True, qkv_bias=bias, out_bias=bias, mlp_bias=False)


def _refuse_windows(keys: Keys) -> None:
    kinds = keys.raw.get("layer_types")
    if keys.flag("use_sliding_window", default=False) or (
        kinds is not None
        and not (isinstance(kinds, list) and all(kind == _FULL_ATTENTION for kind in kinds))
    ):
        raise EdgekitError(
            f"config: only layers of {_FULL_ATTENTION} are supported, not the sliding windows of "
            f"use_sliding_window or layer_types {show(kinds)}"
        )
