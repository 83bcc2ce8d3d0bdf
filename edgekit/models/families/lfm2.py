"""LFM2 and LFM2.5, dense text models: gated short convolutions and grouped-query attention.

The spellings and the feed-forward rule follow transformers' `Lfm2Config` and `Lfm2MLP`
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/lfm2), the blocks
the technical report, arXiv 2511.23404, section 2.
"""

import math
from dataclasses import dataclass
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.models.architecture import (
    Architecture,
    Attention,
    GatedMlp,
    Layer,
    Linear,
    Mixer,
    Norm,
    Parameter,
    ShortConv,
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
    read_head_dim,
    read_rope,
    show,
    token_ids,
)

CONVOLUTION, ATTENTION = "conv", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Lfm2Config(ModelConfig):
    """A model of the family; `layer_types` has one entry a layer."""

    layer_types: tuple[str, ...]
    conv_kernel: int


def read(keys: Keys) -> Lfm2Config:
    """Read a config.json of any age."""
    hidden = keys.integer("hidden_size", high=MAX_WIDTH)
    heads = keys.integer("num_attention_heads", high=MAX_WIDTH)
    types = _layer_types(keys)
    kernel = keys.integer("conv_L_cache", default=3, high=64)
    check_range("conv_L_cache", kernel, 2, 64)
    if keys.flag("conv_bias", default=False):
        raise EdgekitError("config: conv_bias true is not supported (no public LFM2 has it)")
    return Lfm2Config(
        family="lfm2",
        vocab_size=keys.integer("vocab_size", high=MAX_VOCAB),
        hidden_size=hidden,
        num_layers=len(types),
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", high=MAX_WIDTH),
        head_dim=read_head_dim(keys, hidden, heads),
        intermediate_size=_feed_forward_width(keys),
        max_context=keys.integer("max_position_embeddings", default=128_000, high=MAX_CONTEXT),
        bos_id=keys.integer("bos_token_id", default=1, low=0, high=MAX_VOCAB),
        eos_ids=token_ids(keys.raw.get("eos_token_id"), "eos_token_id"),
        pad_id=_pad_id(keys),
        norm_eps=keys.number("norm_eps", "block_norm_eps", default=1e-5),
        rope=read_rope(keys, theta=1_000_000.0),
        tie_embeddings=keys.flag("tie_word_embeddings", "tie_embedding", default=True),
        layer_types=types,
        conv_kernel=kernel,
    )


def write(config: Lfm2Config) -> dict[str, Any]:
    """Return the keys of transformers' `Lfm2Config`."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": config.num_layers,
        "layer_types": list(config.layer_types),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope.theta, "rope_type": "default"},
        "conv_L_cache": config.conv_kernel,
        "conv_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def architecture(config: Lfm2Config) -> Architecture:
    """Return the blocks; the last norm is called after the embedding."""
    layers = tuple(_layer(config, index) for index in range(config.num_layers))
    norm = Norm.of("model.embedding_norm", config.hidden_size, config.norm_eps, "final_norm")
    return Architecture.of(
        config.vocab_size, config.hidden_size, layers, norm, config.tie_embeddings
    )


def _layer(config: Lfm2Config, index: int) -> Layer:
    name, width, inner = f"model.layers.{index}", config.hidden_size, config.intermediate_size
    mlp = f"{name}.feed_forward"
    return Layer(
        name,
        Norm.of(f"{name}.operator_norm", width, config.norm_eps, "mixer_norm"),
        _mixer(config, name, config.layer_types[index]),
        Norm.of(f"{name}.ffn_norm", width, config.norm_eps, "mlp_norm"),
        GatedMlp(
            mlp,
            Linear.of(f"{mlp}.w1", inner, width, "mlp.gate"),
            Linear.of(f"{mlp}.w3", inner, width, "mlp.up"),
            Linear.of(f"{mlp}.w2", width, inner, "mlp.down"),
        ),
    )


def _mixer(config: Lfm2Config, layer: str, kind: str) -> Mixer:
    width = config.hidden_size
    if kind == CONVOLUTION:
        name = f"{layer}.conv"
        return ShortConv(
            name,
            Linear.of(f"{name}.in_proj", 3 * width, width, "conv.in"),
            Parameter(f"{name}.conv.weight", (width, 1, config.conv_kernel), "conv.kernel"),
            Linear.of(f"{name}.out_proj", width, width, "conv.out"),
        )
    name, head = f"{layer}.self_attn", config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    return Attention(
        name,
        Linear.of(f"{name}.q_proj", queries, width, "attention.q"),
        Linear.of(f"{name}.k_proj", keys, width, "attention.k"),
        Linear.of(f"{name}.v_proj", keys, width, "attention.v"),
        Linear.of(f"{name}.out_proj", width, queries, "attention.out"),
        Norm.of(f"{name}.q_layernorm", head, config.norm_eps, "attention.q_norm"),
        Norm.of(f"{name}.k_layernorm", head, config.norm_eps, "attention.k_norm"),
        config.num_heads,
        config.num_kv_heads,
        head,
        config.rope,
    )


def _layer_types(keys: Keys) -> tuple[str, ...]:
    types, indices = keys.raw.get("layer_types"), keys.raw.get("full_attn_idxs")
    if types is None and indices is None:
        missing("layer_types", "full_attn_idxs")
    count = keys.integer(
        "num_hidden_layers",
        high=MAX_LAYERS,
        default=len(types) if isinstance(types, list) else None,
    )
    from_indices = None if indices is None else _types_of_indices(indices, count)
    if types is None:
        assert from_indices is not None
        return from_indices
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise EdgekitError(f"config: layer_types must be a list of names, not {show(types)}")
    if len(types) != count:
        raise EdgekitError(
            f"config: layer_types has {len(types)} entries but num_hidden_layers is {count}"
        )
    for index, kind in enumerate(types):
        if kind not in (CONVOLUTION, ATTENTION):
            raise EdgekitError(
                f"config: layer_types[{index}] is {show(kind)}; "
                f"supported: {CONVOLUTION}, {ATTENTION}"
            )
    if from_indices is not None and from_indices != tuple(types):
        raise EdgekitError("config: layer_types contradicts full_attn_idxs; keep only one of them")
    return tuple(types)


def _types_of_indices(indices: object, count: int) -> tuple[str, ...]:
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise EdgekitError(
            f"config: full_attn_idxs must be a list of integers, not {show(indices)}"
        )
    for index in indices:
        if not 0 <= index < count:
            raise EdgekitError(
                f"config: full_attn_idxs names layer {show(index)}; "
                f"the model has layers 0 to {count - 1}"
            )
    if len(set(indices)) != len(indices):
        raise EdgekitError("config: full_attn_idxs names a layer twice")
    return tuple(ATTENTION if i in set(indices) else CONVOLUTION for i in range(count))


def _feed_forward_width(keys: Keys) -> int:
    """Effective width: transformers' Lfm2MLP, where the adjustment is on unless switched off."""
    width = keys.integer("intermediate_size", "block_ff_dim", high=MAX_WIDTH)
    if not keys.flag("block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if "block_ffn_dim_multiplier" in keys.raw and keys.raw["block_ffn_dim_multiplier"] is None:
        return width  # there, a null multiplier also switches the rounding off
    multiplier = keys.number("block_ffn_dim_multiplier", default=1.0)
    if not 0 < multiplier <= 1024:
        raise EdgekitError(
            f"config: block_ffn_dim_multiplier must lie above 0 and up to 1024, not {multiplier:g}"
        )
    multiple = keys.integer("block_multiple_of", default=256, high=MAX_WIDTH)
    return multiple * math.ceil(int(multiplier * width) / multiple)


def _pad_id(keys: Keys) -> int | None:
    if keys.raw.get("pad_token_id", 0) is None:
        return None
    return keys.integer("pad_token_id", default=0, low=0, high=MAX_VOCAB)
