"""onnxruntime-genai's own LFM2 folders at an LFM2 shape with random weights: the ONNX incumbent.

    python -m benchmarks.peers.make_genai lfm2-350m -o FOLDER [--precision int4 --precision int8]

A random bf16 checkpoint in Hugging Face layout goes through the documented command,
`python -m onnxruntime_genai.models.builder -p PRECISION -e cpu`, which needs the package `onnx_ir`.
The tokenizer is a stand-in, as the builder only copies it.

Writes FOLDER/NAME-genai-PRECISION/ and, beside it, a .json with cost and facts.
"""

import argparse
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import run
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

PRECISIONS = ("int4", "int8", "fp32")


def config(shape: Shape) -> dict[str, object]:
    """Return config.json of this shape."""
    return {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": LAYERS,
        "layer_types": shape.layer_types,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": KV_HEADS,
        "conv_L_cache": CONV_KERNEL,
        "conv_bias": False,
        "norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": TRAINED_CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write a model folder in Hugging Face layout."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: torch.from_numpy(random_weight(name, size)).bfloat16()
        for name, size in shape.tensors()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = {f"<{i}>": i for i in range(VOCAB)}
    Tokenizer(models.WordLevel(tokens, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": f"<{BOS}>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer) + "\n")
    # last: its presence says that the folder is whole
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1) + "\n")


def build(shape: Shape, folder: Path, precision: str) -> None:
    """Run the builder; the checkpoint is made before the clock starts."""
    folder = folder.resolve()
    source = folder / f"{shape.name}-hf"
    if not (source / "config.json").exists():
        # in a process of its own: a child's peak memory would begin at ours
        this = ("-m", "benchmarks.peers.make_genai")
        run([sys.executable, *this, shape.name, "-o", str(folder), "--prepare"])
    output = folder / f"{shape.name}-genai-{precision}"
    command = [
        *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
        *("-m", str(source), "-o", str(output), "-p", precision, "-e", "cpu"),
        *("-c", str(folder / "cache")),
    ]
    # the builder makes a folder for its cache where it runs
    log = output.with_name(output.name + ".log")
    cost = run(command, cwd=folder, log=log, watch_tree=True).cost
    facts = {
        "file": output.name,
        "made_by": f"onnxruntime-genai {version('onnxruntime-genai')} builder, {precision}",
        "file_bytes": sum(file.stat().st_size for file in output.glob("*.onnx*")),
        "cost": {**asdict(cost), "peak_bytes": cost.peak_bytes},
    }
    output.with_name(output.name + ".json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--prepare", action="store_true", help="only write what it reads")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.prepare:
        write_checkpoint(shape, arguments.output / f"{shape.name}-hf")
        return
    for precision in arguments.precision or ("int4", "int8"):
        build(shape, arguments.output, precision)


if __name__ == "__main__":
    main()
