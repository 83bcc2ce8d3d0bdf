"""The names that llama.cpp gives to a model's tensors.

Source: `LLM_TENSOR_NAMES` in llama.cpp (src/llama-arch.cpp, gguf-py/gguf/constants.py).
"""

from collections.abc import Iterator

from edgekit.exporters.gguf.architectures import find_architecture
from edgekit.models.architecture import Parameter
from edgekit.models.config import ModelConfig

ROPE_DIVISORS = "rope_freqs.weight"
"""By what each frequency of the rotation is divided: no tensor of a checkpoint."""

_STEMS = {
    "embedding": "token_embd",
    "head": "output",
    "mixer_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "conv.in": "shortconv.in_proj",
    "conv.kernel": "shortconv.conv",
    "conv.out": "shortconv.out_proj",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Return llama.cpp's name of each tensor by the checkpoint's, a tied head's too."""
    stems = _STEMS | {"final_norm": find_architecture(config).final_norm}
    return {
        tensor.name: f"{layer}{stems[tensor.role]}.{tensor.name.rpartition('.')[2]}"
        for layer, tensor in _placed(config)
    }


def _placed(config: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    """Yield each tensor with what llama.cpp calls its layer."""
    layers = {
        tensor.name: f"blk.{index}."
        for index, layer in enumerate(config.architecture.layers)
        for tensor in layer.tensors
    }
    for tensor in config.architecture.table():
        yield layers.get(tensor.name, ""), tensor
