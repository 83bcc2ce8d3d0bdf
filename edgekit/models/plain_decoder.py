"""What plain pre-norm decoders share: attention and a gated feed-forward in every layer.

Llama's and Qwen3's configurations spell it with the same keys, and most checkpoints name it alike.
"""

from typing import Any, Literal

from edgekit.errors import EdgekitError
from edgekit.models.architecture import Architecture, Attention, GatedMlp, Layer, Linear, Norm
from edgekit.models.config import ModelConfig
from edgekit.models.config_keys import MAX_VOCAB, Keys, show


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
