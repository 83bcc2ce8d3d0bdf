"""Llama 3.2, SmolLM2 and what else is a plain pre-norm decoder with rotary positions.

The spellings are those of transformers' `LlamaConfig`
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.errors import EdgekitError
from edgekit.models.architecture import (
    Architecture,
    Attention,
    BandScaling,
    GatedMlp,
    Layer,
    Linear,
    Norm,
)
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


def refuse_other_activations(keys: Keys) -> None:
    """Refuse a feed-forward that is no SwiGLU."""
    activation = keys.raw.get("hidden_act")
    if activation not in (None, "silu"):
        raise EdgekitError(
            f"config: hidden_act {show(activation)} is not supported; supported: silu"
        )


def read_pad_id(keys: Keys) -> int | None:
    """Return the padding token, which many models have not."""
    if keys.raw.get("pad_token_id") is None:
        return None
    return keys.integer("pad_token_id", low=0, high=MAX_VOCAB)


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


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that transformers' configurations of such decoders share."""
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def plain_architecture(
    config: ModelConfig, head_norms: bool, qkv_bias: bool, out_bias: bool, mlp_bias: bool
) -> Architecture:
    """Return layers of attention and feed-forward by the names that most checkpoints have.

    `head_norms` normalises each head of queries and keys before the rotation.
    """
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head

    def head_norm(name: str, role: Literal["attention.q_norm", "attention.k_norm"]) -> Norm | None:
        return Norm.of(name, head, config.norm_eps, role) if head_norms else None

    def layer(name: str) -> Layer:
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return Layer(
            name,
            Norm.of(f"{name}.input_layernorm", width, config.norm_eps, "mixer_norm"),
            Attention(
                attention,
                Linear.of(f"{attention}.q_proj", queries, width, "attention.q", qkv_bias),
                Linear.of(f"{attention}.k_proj", keys, width, "attention.k", qkv_bias),
                Linear.of(f"{attention}.v_proj", keys, width, "attention.v", qkv_bias),
                Linear.of(f"{attention}.o_proj", width, queries, "attention.out", out_bias),
                head_norm(f"{attention}.q_norm", "attention.q_norm"),
                head_norm(f"{attention}.k_norm", "attention.k_norm"),
                config.num_heads,
                config.num_kv_heads,
                head,
                config.rope,
            ),
            Norm.of(f"{name}.post_attention_layernorm", width, config.norm_eps, "mlp_norm"),
            GatedMlp(
                mlp,
                Linear.of(f"{mlp}.gate_proj", inner, width, "mlp.gate", mlp_bias),
                Linear.of(f"{mlp}.up_proj", inner, width, "mlp.up", mlp_bias),
                Linear.of(f"{mlp}.down_proj", width, inner, "mlp.down", mlp_bias),
            ),
        )

    layers = tuple(layer(f"model.layers.{index}") for index in range(config.num_layers))
    norm = Norm.of("model.norm", width, config.norm_eps, "final_norm")
    return Architecture.of(config.vocab_size, width, layers, norm, config.tie_embeddings)
