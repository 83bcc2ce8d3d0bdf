"""LFM2 shapes with random weights as GGUF: BF16, then what llama-quantize makes of it.

    python -m benchmarks.peers.make_gguf lfm2-350m -o FOLDER --llama-quantize PATH

Writes FOLDER/NAME-bf16.gguf, NAME-q8_0.gguf, NAME-q4_0.gguf (llama-quantize's plain Q4_0: its tied
embedding, which is also the head, becomes Q6_K) and NAME-q4_0-pure.gguf (everything Q4_0), each
with a .json of facts. The tokenizer inside is a stand-in of the right size: llama-bench loads it
and never uses it.
"""

import argparse
import json
import subprocess
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize

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
from edgekit.exporters.gguf.names import gguf_names
from edgekit.models.source import resolve_model

QUANTIZED = {
    "q8_0": ["Q8_0"],
    "q4_0": ["Q4_0"],
    "q4_0-pure": ["--pure", "--token-embedding-type", "q4_0", "Q4_0"],
}


def stored_type(name: str) -> GGMLQuantizationType:
    """Norms and the convolution must be F32, or llama.cpp aborts."""
    float32 = name.endswith(("_norm.weight", "shortconv.conv.weight"))
    return GGMLQuantizationType.F32 if float32 else GGMLQuantizationType.BF16


def write_bf16(shape: Shape, path: Path) -> None:
    """Write the shape as a GGUF of BF16 matrices; tensors spool to disk, not to memory."""
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, "lfm2", use_temp_file=True)
    _add_metadata(writer, shape)
    _add_tokenizer(writer)
    names = gguf_names(resolve_model(shape.name, random_weights=True).config)
    for source, size in shape.tensors():
        # the depthwise kernel is stored without its middle axis of 1
        values = random_weight(source, size).reshape([n for n in size if n != 1])
        name = names[source]
        kind = stored_type(name)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"{shape.name} with random weights")
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(2)
    writer.add_vocab_size(VOCAB)
    writer.add_block_count(LAYERS)
    writer.add_context_length(TRAINED_CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    # an array, and 0 is what marks a convolution layer
    writer.add_head_count_kv([KV_HEADS * (kind != "conv") for kind in shape.layer_types])
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_shortconv_l_cache(CONV_KERNEL)


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokens = [f"[PAD{i}]" for i in range(VOCAB)]
    kinds = [TokenType.UNUSED] * VOCAB
    for i in (PAD, BOS, EOS):
        tokens[i], kinds[i] = f"<|{i}|>", TokenType.CONTROL
    letters = [*map(chr, range(ord("!"), ord("~") + 1)), "\u0120", "\u010a"]  # space and newline
    for i, letter in enumerate(letters, start=EOS + 1):
        tokens[i], kinds[i] = letter, TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(True)


def facts(path: Path, made_by: str) -> dict[str, object]:
    """Return what the comparison prints about a file, read from the file itself."""
    tensors = GGUFReader(path).tensors
    embedding = next(t for t in tensors if t.name == "token_embd.weight")
    return {
        "file": path.name,
        "made_by": made_by,
        "head": embedding.tensor_type.name,
        "embedding": f"{embedding.tensor_type.name}, shared with the head",
        "file_bytes": path.stat().st_size,
        # tied: the embedding table is the head, so a token reads every tensor once
        "bytes_per_token": sum(int(t.n_bytes) for t in tensors),
    }


def write_facts(path: Path, made_by: str) -> None:
    text = json.dumps(facts(path, made_by), indent=2)
    path.with_suffix(path.suffix + ".json").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--llama-quantize", type=Path, required=True, metavar="PATH")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = arguments.output / f"{arguments.shape}-bf16.gguf"
    if not source.exists():
        write_bf16(SHAPES[arguments.shape], source)
        write_facts(source, "gguf-py")
    for suffix, options in QUANTIZED.items():
        target = arguments.output / f"{arguments.shape}-{suffix}.gguf"
        *flags, kind = options
        command = [arguments.llama_quantize, *flags, source, target, kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        write_facts(target, " ".join(["llama-quantize", *options]))


if __name__ == "__main__":
    main()
