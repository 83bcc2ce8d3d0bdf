"""Writes `genai_config.json`, by which onnxruntime-genai finds its way in a folder.

Keys: models/builders/base.py (make_genai_config) and lfm2.py of onnxruntime-genai 0.18.
"""

import json
from pathlib import Path
from typing import Any

from edgekit.exporters.onnx.states import GENAI
from edgekit.models.architecture import ShortConv
from edgekit.models.config import ModelConfig


def write_genai_config(
    path: Path, config: ModelConfig, context: int, model_file: str, shared_buffer: bool
) -> None:
    """Describe a model; `shared_buffer` says that caches are written where they are read."""
    convs = config.architecture.short_convs()
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    if convs:
        inputs["past_conv_names"] = GENAI.past_conv
        outputs["present_conv_names"] = GENAI.present_conv
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model_file,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
    }
    if convs:
        decoder["layer_types"] = [
            "conv" if isinstance(layer.mixer, ShortConv) else "full_attention"
            for layer in config.architecture.layers
        ]
        decoder["conv_cache_size"] = convs[0].kernel - 1
    pad = config.eos_ids[0] if config.pad_id is None else config.pad_id
    model = {
        "type": config.family,
        "vocab_size": config.vocab_size,
        "context_length": context,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": pad,
        "decoder": decoder,
    }
    search: dict[str, Any] = {
        "do_sample": False,
        "max_length": context,
        "past_present_share_buffer": shared_buffer,
    }
    path.write_text(json.dumps({"model": model, "search": search}, indent=1) + "\n")
