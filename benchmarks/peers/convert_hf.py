"""llama.cpp's own way from a Hugging Face folder to a GGUF: its converter, then llama-quantize.

    python -m benchmarks.peers.convert_hf prepare lfm2-1.2b [--layers N] -o FOLDER
    python -m benchmarks.peers.convert_hf convert FOLDER --llama-cpp SOURCE -o FILE.gguf

`prepare` writes a shape with random bfloat16 weights as the model's release would lie on disk. Its
tokenizer is that of the model bundled with edgekit: the converter knows a tokenizer by a hash of
what it does to one text, and knows not this one, so `convert` runs convert_hf_to_gguf.py with the
name of LFM2's put in. The rest of its vocabulary of 65536 is filled in by converter and exporter
alike.
"""

import argparse
import json
import runpy
import shutil
import struct
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.shapes import (
    BOS,
    CONV_KERNEL,
    EOS,
    KV_HEADS,
    LAYERS,
    NORM_EPS,
    PAD,
    ROPE_THETA,
    SHAPES,
    TRAINED_CONTEXT,
    VOCAB,
    Shape,
    random_weight,
)

TOKENIZER = Path(__file__).parents[2] / "edgekit" / "models" / "lfm2_tiny"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def prepare(shape: Shape, folder: Path) -> None:
    """Write the model folder; tensors go to disk one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)
    header, offset = dict[str, object](), 0
    for name, size in shape.tensors():
        end = offset + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    partial = folder / "model.partial"
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in shape.tensors():
            values = torch.from_numpy(random_weight(name, size)).bfloat16()
            file.write(values.view(torch.int16).numpy().astype(np.int16).tobytes())
    partial.rename(folder / "model.safetensors")


def config(shape: Shape) -> dict[str, object]:
    """Return the config.json of the release."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "num_hidden_layers": shape.layers,
        "layer_types": shape.layer_types,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": TRAINED_CONTEXT,
        "norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "conv_L_cache": CONV_KERNEL,
        "conv_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def convert(folder: Path, source: Path, output: Path) -> None:
    """Run convert_hf_to_gguf.py of the llama.cpp tree `source`, with its own gguf-py."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel  # of `source`

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "lfm2"
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(folder), "--outfile", str(output), "--outtype", "bf16"]
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True, dest="action")
    preparing = actions.add_parser("prepare")
    preparing.add_argument("shape", choices=SHAPES)
    preparing.add_argument("--layers", type=int, default=LAYERS, help="only the first so many")
    converting = actions.add_parser("convert")
    converting.add_argument("folder", type=Path)
    converting.add_argument("--llama-cpp", type=Path, required=True, metavar="SOURCE")
    for action in (preparing, converting):
        action.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.action == "prepare":
        shape = replace(SHAPES[arguments.shape], layers=arguments.layers)
        prepare(shape, arguments.output)
    else:
        convert(arguments.folder, arguments.llama_cpp.resolve(), arguments.output)


if __name__ == "__main__":
    main()
