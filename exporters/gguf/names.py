"""The names that llama.cpp gives to a checkpoint's tensors.

Source: `LLM_TENSOR_NAMES`, `MODEL_TENSORS` of architecture lfm2 in llama.cpp (src/llama-arch.cpp,
gguf-py/gguf/constants.py).
"""

import re

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.embedding_norm": "token_embd_norm",  # the final norm, in spite of its name
    "lm_head": "output",
    "operator_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a checkpoint tensor, with `.weight`; KeyError if it has none."""
    stem = name.removesuffix(".weight")
    layer = _LAYER.fullmatch(stem)
    if layer is None:
        return f"{_NAMES[stem]}.weight"
    return f"blk.{layer[1]}.{_NAMES[layer[2]]}.weight"


def checkpoint_names(layers: int) -> dict[str, str]:
    """Return the checkpoint's name of every tensor that a model of so many layers can have."""
    outer = [name for name in _NAMES if name.startswith(("model.", "lm_head"))]
    inner = [name for name in _NAMES if name not in outer]
    names = [f"{name}.weight" for name in outer]
    names += [f"model.layers.{i}.{name}.weight" for i in range(layers) for name in inner]
    return {gguf_name(name): name for name in names}
