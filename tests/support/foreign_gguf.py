"""The bundled model as a GGUF written by gguf-py alone: what a stock file is to edgekit."""

import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from safetensors import safe_open

import edgekit.models

FOLDER = Path(edgekit.models.__file__).parent / "lfm2_tiny"
LAYER_NAMES = {
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
OUTER_NAMES = {"embed_tokens": "token_embd", "embedding_norm": "token_embd_norm"}


def write_foreign_gguf(
    path: Path, kind: str = "F32", without: str | None = None, template: bool = True
) -> Path:
    """Write the model with its matrices of a type of ggml's; one tensor may be left out."""
    config = json.loads((FOLDER / "config.json").read_text())
    writer = GGUFWriter(path, "lfm2")
    writer.add_name("a stock file")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    heads = config["num_key_value_heads"]
    writer.add_head_count_kv([heads * (kind != "conv") for kind in config["layer_types"]])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    _add_tokenizer(writer, config["vocab_size"], template)
    with safe_open(FOLDER / "model.safetensors", "pt") as checkpoint:
        for source in checkpoint.keys():  # noqa: SIM118 - it is no mapping
            name = _name(source)
            if name == without:
                continue
            values = checkpoint.get_tensor(source).float().numpy()
            # the depthwise kernel is stored without its middle axis of 1
            values = np.ascontiguousarray(values.reshape([n for n in values.shape if n != 1]))
            small = values.ndim == 1 or "shortconv.conv" in name
            stored = GGMLQuantizationType["F32" if small else kind]
            writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(source: str) -> str:
    parts = source.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{LAYER_NAMES['.'.join(parts[2:])]}.weight"
    return f"{OUTER_NAMES[parts[0]]}.weight"


def _add_tokenizer(writer: GGUFWriter, size: int, template: bool) -> None:
    raw = json.loads((FOLDER / "tokenizer.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for text, i in raw["model"]["vocab"].items():
        tokens[i], kinds[i] = text, TokenType.NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], TokenType.CONTROL
    merges = raw["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(7)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template((FOLDER / "chat_template.jinja").read_text())
