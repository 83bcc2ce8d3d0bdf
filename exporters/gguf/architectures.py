"""What llama.cpp calls the models of each family, and what it expects of them.

Sources: src/models/NAME.cpp and conversion/NAME.py of llama.cpp, `llama_model_rope_type` in
src/llama-model.cpp.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.writer import Value
from edgekit.models.architecture import Attention, Linear, Role
from edgekit.models.config import ModelConfig

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's expression, by which many tokenizers split text."""
SINGLE_DIGITS_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_QKV: frozenset[Role] = frozenset({"attention.q", "attention.k", "attention.v"})


@dataclass(frozen=True)
class GgufArchitecture:
    """One of llama.cpp's architectures.

    name           `general.architecture`, and what its keys begin with
    own_keys       keys beyond those that all have, without that beginning
    biases         the roles of linears that may have one
    any_head_dim   whether heads times head_dim may be another number than the model's width
    pairs          whether the rotation turns neighbours: rows of queries and keys are then stored
                   so that the halves of a head alternate
    final_norm     the stem of the last norm
    both_mixers    whether it takes only models that have convolutions and attention
    llama3_split   its name for a tokenizer that splits text by Llama 3's expression
    """

    name: str
    own_keys: Callable[[ModelConfig], Mapping[str, Value]]
    biases: frozenset[Role] = frozenset()
    any_head_dim: bool = True
    pairs: bool = False
    final_norm: str = "output_norm"
    llama3_split: str = "llama-bpe"
    both_mixers: bool = False


def _short_convs(config: ModelConfig) -> dict[str, Value]:
    layers, convs = config.architecture.layers, config.architecture.short_convs()
    heads = [layer.mixer.kv_heads if isinstance(layer.mixer, Attention) else 0 for layer in layers]
    return {
        "attention.head_count_kv": np.array(heads, np.int32),  # 0 marks a convolution
        "shortconv.l_cache": convs[0].kernel,  # there is one: `both_mixers`
    }


def _heads(config: ModelConfig) -> dict[str, Value]:
    return {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "lfm2": GgufArchitecture(
        "lfm2",
        _short_convs,
        any_head_dim=False,
        both_mixers=True,
        final_norm="token_embd_norm",  # the last norm, in spite of its name
        llama3_split="lfm2",
    ),
    "llama": GgufArchitecture(
        "llama",
        _heads,
        biases=_QKV | {"attention.out", "mlp.gate", "mlp.up", "mlp.down"},
        pairs=True,
    ),
    "qwen3": GgufArchitecture("qwen3", _heads, biases=_QKV),
}


def split_names(architecture: GgufArchitecture) -> dict[str, str]:
    """Return llama.cpp's names of how a tokenizer splits text, by the steps of tokenizer.json.

    Each is built in, by its name (src/llama-vocab.cpp).
    """
    return {
        "ByteLevel": "gpt-2",
        "Digits ByteLevel": "smollm",
        f"Split {LLAMA3_SPLIT}": architecture.llama3_split,
        f"Split {SINGLE_DIGITS_SPLIT}": "qwen2",
    }


def find_architecture(config: ModelConfig) -> GgufArchitecture:
    """Return llama.cpp's architecture for a model; EdgekitError where it has none here."""
    found = ARCHITECTURES.get(config.family)
    if found is None:
        raise EdgekitError(f"target gguf cannot hold models of model_type {config.family}")
    return found


def check_blocks(config: ModelConfig) -> None:
    """Refuse, by the tensor's name, what llama.cpp's architecture has no place for."""
    found = find_architecture(config)
    whole = config.architecture
    if found.both_mixers and not (whole.attentions() and whole.short_convs()):
        there = "attention" if whole.attentions() else "convolution"
        raise EdgekitError(
            f"config: layer_types are all of {there}; llama.cpp's {found.name} has layers of both "
            "kinds, convolution and attention: give target executorch or onnx"
        )
    for layer in config.architecture.layers:
        for _, block in layer.halves:
            for linear in (*block.entering, block.leaving):
                _check_bias(linear, found)
    for block in config.architecture.attentions():
        rows = block.q.weight.shape[0]
        if rows != config.hidden_size and not found.any_head_dim:
            raise EdgekitError(
                f"{block.q.weight.name}: has {rows} rows; llama.cpp's {found.name} has as many as "
                f"the model is wide, {config.hidden_size} (heads times head_dim): "
                "give target executorch or onnx"
            )


def _check_bias(linear: Linear, architecture: GgufArchitecture) -> None:
    if linear.bias is not None and linear.weight.role not in architecture.biases:
        raise EdgekitError(
            f"{linear.bias.name}: target gguf cannot hold it: llama.cpp's {architecture.name} has "
            "no bias there"
        )


def model_keys(config: ModelConfig, feed_forward_length: int) -> dict[str, Value]:
    """Return the keys that describe a model."""
    found = find_architecture(config)
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": feed_forward_length,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,  # without it llama.cpp takes 10,000, says nothing
    }
    return {
        f"{found.name}.{key}": value for key, value in {**keys, **found.own_keys(config)}.items()
    }
