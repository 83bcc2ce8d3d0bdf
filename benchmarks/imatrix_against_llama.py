"""How far `edgekit imatrix` is from llama-imatrix on the same float GGUF and text.

    python -m benchmarks.imatrix_against_llama lfm2-tiny FLOAT.gguf --text FILE \
        --llama-imatrix LLAMA/bin/llama-imatrix [--chunks 4]

FLOAT.gguf is the model as `edgekit export MODEL --target gguf --float` writes it. llama.cpp
multiplies bfloat16 matrices with activations rounded to bfloat16 too, so it runs the file made
float32 by llama-quantize as well, with float32 caches and without flash attention, which rounds:
only there do both compute the same.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import table
from edgekit.common.files import read_text
from edgekit.exporters.gguf.llama.imatrix import Imatrix
from edgekit.models.source import resolve_model
from edgekit.workflows.importance import imatrix_of_text

EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


def llama_imatrix(
    tool: Path, model: Path, text: Path, chunks: int, folder: Path, *flags: str
) -> Imatrix:
    """Run llama-imatrix, and read what it wrote."""
    output = folder / "imatrix.gguf"
    command = [tool, "-m", model, "-f", text, "-o", output, "--chunks", str(chunks), "--no-ppl"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    return Imatrix.load(output)


def difference(ours: Imatrix, theirs: Imatrix) -> list[str]:
    """Return the largest relative difference of a sum, and of a matrix's sums in norm."""
    if ours.entries.keys() != theirs.entries.keys():
        raise SystemExit(f"other matrices: {sorted(ours.entries.keys() ^ theirs.entries.keys())}")
    single, norm = 0.0, 0.0
    for name, entry in theirs.entries.items():
        if entry.count != ours.entries[name].count:
            raise SystemExit(f"{name}: {ours.entries[name].count} tokens against {entry.count}")
        gap = np.abs(ours.entries[name].sums - entry.sums)
        single = max(single, float((gap / entry.sums).max()))
        norm = max(norm, float(np.linalg.norm(gap) / np.linalg.norm(entry.sums)))
    return [f"{single:.1e}", f"{norm:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama-imatrix", type=Path, required=True, metavar="PATH")
    parser.add_argument("--chunks", type=int, default=4)
    arguments = parser.parse_args()
    source, text = resolve_model(arguments.model), read_text(arguments.text)
    ours = imatrix_of_text(source, text, arguments.text.name, chunks=arguments.chunks)
    tool: Path = arguments.llama_imatrix
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "f32.gguf"
        quantize = tool.with_name("llama-quantize")
        subprocess.run([quantize, arguments.gguf, exact, "F32"], check=True, capture_output=True)
        for label, path, flags in (
            ("float32, caches float32, no flash attention", exact, EXACT),
            ("the file as it is, llama-imatrix's defaults", arguments.gguf, ()),
        ):
            theirs = llama_imatrix(
                tool, path, arguments.text, arguments.chunks, Path(folder), *flags
            )
            rows.append([label, str(len(theirs.entries)), *difference(ours, theirs)])
    columns = (
        "llama-imatrix on",
        "matrices",
        "largest difference of a sum",
        "of a matrix, in norm",
    )
    print(table(columns, rows))


if __name__ == "__main__":
    main()
