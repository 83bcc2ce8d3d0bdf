"""Llama 3.2, SmolLM2 and what else is a plain pre-norm decoder with rotary positions.

The spellings are those of transformers' `LlamaConfig`
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.models.architecture import Architecture, BandScaling
from edgekit.models.config import ModelConfig
from edgekit.models.config_keys import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Keys,
    check_range,
    missing,
    number,
    read_head_dim,
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

BANDS = "llama3"
"""transformers' rope_type of `BandScaling`."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A model of the family: whether the linears of its blocks have biases."""

    attention_bias: bool
    mlp_bias: bool


def read(keys: Keys) -> LlamaConfig:
    """Read a config.json; a head is its own unless it says otherwise."""
    refuse_other_activations(keys)
    hidden = keys.integer("hidden_size", high=MAX_WIDTH)
    heads = keys.integer("num_attention_heads", high=MAX_WIDTH)
    return LlamaConfig(
        family="llama",
        vocab_size=keys.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=hidden,
        num_layers=keys.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", high=MAX_WIDTH, default=heads),
        head_dim=read_head_dim(keys, hidden, heads),
        intermediate_size=keys.integer("intermediate_size", high=MAX_WIDTH),
        max_context=keys.integer("max_position_embeddings", default=2048, high=MAX_CONTEXT),
        bos_id=keys.integer("bos_token_id", default=1, low=0, high=MAX_VOCAB),
        eos_ids=token_ids(keys.raw.get("eos_token_id"), "eos_token_id"),
        pad_id=read_pad_id(keys),
        norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope=read_rope(keys, theta=10_000.0, scalings={BANDS: _bands}),
        tie_embeddings=keys.flag("tie_word_embeddings", default=False),
        attention_bias=keys.flag("attention_bias", default=False),
        mlp_bias=keys.flag("mlp_bias", default=False),
    )


def write(config: LlamaConfig) -> dict[str, Any]:
    """Return the keys of transformers' `LlamaConfig`."""
    rope: dict[str, Any] = {"rope_theta": config.rope.theta, "rope_type": "default"}
    if (bands := config.rope.scaling) is not None:
        rope |= {
            "rope_type": BANDS,
            "factor": bands.factor,
            "low_freq_factor": bands.low,
            "high_freq_factor": bands.high,
            "original_max_position_embeddings": bands.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        **write_shared(config),
        "rope_parameters": rope,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def architecture(config: LlamaConfig) -> Architecture:
    """Return the blocks."""
    return plain_architecture(
        config,
        head_norms=False,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def _bands(name: str, table: Mapping[str, Any]) -> BandScaling:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    for key in (*keys, "original_max_position_embeddings"):
        if table.get(key) is None:
            missing(f"{name}.{key}")
    factor, low, high = (number(f"{name}.{key}", table[key]) for key in keys)
    context = table["original_max_position_embeddings"]
    if type(context) is not int:
        raise EdgekitError(
            f"config: {name}.original_max_position_embeddings must be an integer, "
            f"not {show(context)}"
        )
    check_range(f"{name}.original_max_position_embeddings", context, 1, MAX_CONTEXT)
    if not (factor >= 1 and 0 < low < high):
        raise EdgekitError(
            f"config: {name} must have a factor of 1 or more and low_freq_factor below "
            f"high_freq_factor, not {factor:g}, {low:g} and {high:g}"
        )
    return BandScaling(factor, low, high, context)
