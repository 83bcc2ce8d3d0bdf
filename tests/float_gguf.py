"""A float GGUF of a model folder, written with gguf-py: what llama.cpp's quantizer takes."""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
from torch import Tensor

from edgekit.exporters.gguf_names import gguf_name
from edgekit.models.checkpoint import Checkpoint
from edgekit.models.config import ModelConfig
from edgekit.models.weights import floats

F32, BF16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.BF16


def write_float_gguf(
    folder: Path, path: Path, kind: gguf.GGMLQuantizationType = BF16
) -> dict[str, Tensor]:
    """Write `folder`'s model with matrices of type `kind`; return its float32 tensors by name."""
    config = ModelConfig.load(folder)
    writer = gguf.GGUFWriter(path, "lfm2")
    _add_shapes(writer, config)
    _add_tokenizer(writer, folder, config)
    tensors = dict(_tensors(folder))
    for name, values in tensors.items():
        stored = F32 if name.endswith(("_norm.weight", "shortconv.conv.weight")) else kind
        writer.add_tensor(name, gguf.quantize(values.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.shapes():
        # a depthwise kernel [width, 1, taps] is stored without its middle axis
        yield gguf_name(name), floats(checkpoint.tensor(name)).squeeze()


def _add_shapes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    kv_heads = config.num_kv_heads
    writer.add_head_count_kv([kv_heads * (kind != "conv") for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_shortconv_l_cache(config.conv_kernel)


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: ModelConfig) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    raw = json.loads(file.read_text())
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    kinds = [int(gguf.TokenType.UNUSED)] * config.vocab_size
    for token, index in raw["model"]["vocab"].items():
        tokens[index], kinds[index] = token, int(gguf.TokenType.NORMAL)
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = int(special)
    merges = raw["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config.bos_id)
    writer.add_eos_token_id(config.eos_ids[0])
    writer.add_add_bos_token(True)
