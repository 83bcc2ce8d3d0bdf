"""Four bits of lfm2-tiny: edgekit's steps, llama.cpp's formats and torchao, by one evaluator.

    python -m benchmarks.lfm2_tiny_int4 --stories ../shared/data/stories [--qat FILE]
        [-o benchmarks/results/lfm2-tiny-int4.json]

Every row is a file, run in its engine (a GGUF in llama.cpp, the last a .pte in ExecuTorch) and
scored by `edgekit eval` against the float model; bits per weight are those of all tensors in the
file over the model's parameters. What calibrates sees the start of train.txt, what is scored is
valid.txt. --qat takes a file of codes that examples/qat_lfm2_tiny.py wrote. The last table is of
weights alone, in torch: torchao has no GGUF.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import facts
from benchmarks.report import table
from edgekit.exporters.readback import stored_size
from edgekit.formats.artifact.read import Artifact
from edgekit.metrics.divergence import divergence, join, perplexity, score_rows
from edgekit.models.codes import CodesFile
from edgekit.models.config import ModelConfig
from edgekit.models.eager import float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.tensor import Weight
from edgekit.runtime.evaluation.evaluate import cut, evaluate_each, tokenize
from edgekit.workflows.gains import measure

MODEL = "lfm2-tiny"
CALIBRATION_CHARACTERS = 400_000
BASE = "RTN"


def edgekit(*arguments: object) -> dict[str, Any]:
    """Run a command and return its JSON."""
    command = [sys.executable, "-m", "edgekit", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def export(folder: Path, name: str, *arguments: object) -> Path:
    """Export to a folder unless it is there from an earlier row."""
    out = folder / name
    if not out.exists():
        start = time.monotonic()
        target = () if "--target" in arguments else ("--target", "gguf")
        edgekit("export", MODEL, *target, "--context", 512, *arguments, "-o", out)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return out


def bits_per_weight(folder: Path) -> float:
    """Return the bits of all tensors in an artifact's file over the model's parameters."""
    found = Artifact.open(folder)
    config = ModelConfig.load(folder)
    return stored_size(found.target, found.model_path, config).bits_per_weight


def artifacts(folder: Path, text: Path, qat: Path | None) -> dict[str, Path]:
    """Export every row; names in the order of the table."""
    imatrix = folder / "imatrix.gguf"
    if not imatrix.exists():
        edgekit("imatrix", MODEL, "--text", text, "--chunks", 64, "-o", imatrix)
    q4_k_m = export(folder, "Q4_K_M", "--scheme", "Q4_K_M", "--imatrix", imatrix)
    bits = bits_per_weight(q4_k_m)
    budget = ("--bits", f"{bits:.4f}")
    calibrated = ("--calibrate", text)
    rows = {
        "float": export(folder, "float", "--float"),
        "int8": export(folder, "int8", "--int8"),
        BASE: export(folder, "rtn", "--int4", "--method", "rtn"),
        "minimum error": export(folder, "mse", "--int4"),
        "GPTQ": export(folder, "gptq", "--int4", *calibrated),
    }
    if qat is not None:
        rows["QAT"] = export(folder, f"qat-{qat.stem}", "--codes", qat)
    return rows | {
        "llama.cpp Q4_0, imatrix": export(folder, "Q4_0", "--scheme", "Q4_0", "--imatrix", imatrix),
        "llama.cpp Q4_K_M, imatrix": q4_k_m,
        "mixed, minimum error": export(folder, f"mixed-mse-{bits:.4f}", *budget),
        "mixed, GPTQ": export(folder, f"mixed-gptq-{bits:.4f}", *budget, *calibrated),
        "mixed, GPTQ, as a .pte": export(
            folder, f"mixed-gptq-pte-{bits:.4f}", *budget, *calibrated, "--target", "executorch"
        ),
    }


def scored(rows: Mapping[str, Path], text: str, chunks: int | None) -> list[dict[str, Any]]:
    """Evaluate every artifact in its engine, with one run of the float model for all."""

    def show(done: int, total: int, _label: str) -> None:
        print(f"scored {done} of {total} chunks", file=sys.stderr, flush=True)

    found = evaluate_each(
        [str(path) for path in rows.values()],
        text,
        MODEL,
        chunks=chunks,
        threads=1,
        progress=show,
    )
    return [
        {
            "row": name,
            "bits_per_weight": bits_per_weight(path),
            **one.to_dict(),
            "name": name,
        }
        for (name, path), one in zip(rows.items(), found, strict=True)
    ]


def weights_alone(
    source: ModelSource, codes: Mapping[str, Path], text: str, chunks: int
) -> list[dict[str, Any]]:
    """Score codes, and torchao's, on the float model's activations."""
    assert source.folder is not None
    tokenizer = Tokenizer.load(source.folder)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    pieces = cut(tokenize(tokenizer, text), 512, chunks, bos)

    def reader(path: Path) -> Callable[[], Mapping[str, Weight]]:
        return lambda: dict(CodesFile.open(path, source.config))

    gains = measure(
        source.config,
        float_reader(source.config, source.checkpoint),
        {name: reader(path) for name, path in codes.items()},
        pieces,
        lambda done, total, label: None,
    )
    rows = [
        {
            "row": gain.step,
            "kld": gain.kld.to_dict(),
            "perplexity": gain.perplexity.to_dict(),
        }
        for gain in gains.steps
    ]
    return rows + torchao_rows(source, pieces)


def torchao_rows(source: ModelSource, pieces: list[list[int]]) -> list[dict[str, Any]]:
    """Quantize transformers' model by torchao's `quantize_`, by the recipe of `--int4`.

    Linears int4 in groups of 32, symmetric, embedding and head int8 per row. The head is untied
    first, as torchao would.
    """
    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
        from transformers import Lfm2ForCausalLM
    except ImportError as error:
        print(f"torchao left out: {error}", file=sys.stderr)
        return []

    def model() -> torch.nn.Module:
        return Lfm2ForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()

    def logits(module: torch.nn.Module, piece: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.tensor([piece[:-1]])).logits[0, len(piece) // 2 :].numpy()

    exact = model()
    rows = []
    plain, hqq = IntxChooseQParamsAlgorithm.AFFINE, IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
    for name, mapping, algorithm in (
        ("torchao, symmetric", MappingType.SYMMETRIC, plain),
        ("torchao, symmetric, HQQ", MappingType.SYMMETRIC, hqq),
        ("torchao, asymmetric", MappingType.ASYMMETRIC, plain),
    ):
        module = model()
        table_of = module.get_input_embeddings().weight
        module.lm_head.weight = torch.nn.Parameter(table_of.detach().clone())
        module.config.tie_word_embeddings = False
        eight = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
        four = IntxWeightOnlyConfig(
            torch.int4, PerGroup(32), mapping, intx_choose_qparams_algorithm=algorithm
        )
        quantize_(
            module, eight, lambda one, fqn: isinstance(one, torch.nn.Embedding) or "lm_head" in fqn
        )
        quantize_(
            module, four, lambda one, fqn: isinstance(one, torch.nn.Linear) and "lm_head" not in fqn
        )
        scores = join(
            [
                score_rows(
                    logits(module, piece), piece[len(piece) // 2 + 1 :], logits(exact, piece)
                )
                for piece in pieces
            ]
        )
        found = divergence(scores)
        assert found is not None
        rows.append(
            {
                "row": name,
                "kld": found.kld.to_dict(),
                "perplexity": perplexity(scores.nll).to_dict(),
            }
        )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """Return both tables."""
    rows = record["rows"]
    base = next(row for row in rows if row["row"] == BASE)["divergence"]["kld"]["value"]
    cells = [
        [
            row["row"],
            f"{row['bits_per_weight']:.2f}",
            estimate(row["perplexity"], 3),
            estimate(row["divergence"]["kld"], 5),
            f"{row['divergence']['kld']['value'] / base:.2f}x",
        ]
        for row in rows
    ]
    first = table(("", "bits per weight", "perplexity", "mean KLD", "of RTN"), cells)
    alone = record["weights_alone"]
    base = alone[0]["kld"]["value"]
    cells = [
        [
            row["row"],
            estimate(row["perplexity"], 3),
            estimate(row["kld"], 5),
            f"{row['kld']['value'] / base:.2f}x",
        ]
        for row in alone
    ]
    second = table(("weights alone, in torch", "perplexity", "mean KLD", "of RTN"), cells)
    reference = rows[0]["divergence"]["reference_perplexity"]
    scope = f"{rows[0]['tokens']:,} tokens scored; the float model: {estimate(reference, 3)}"
    return f"{first}\n\n{scope}\n\n{second}"


def estimate(value: dict[str, float], digits: int) -> str:
    return f"{value['value']:.{digits}f} ± {value['error']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stories", type=Path, default=Path("../shared/data/stories"))
    parser.add_argument("--qat", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--work", type=Path, help="Folder for the artifacts, kept and reused")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = (arguments.stories / "valid.txt").read_text()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(exist_ok=True)
        train = folder / "train-start.txt"
        train.write_text((arguments.stories / "train.txt").read_text()[:CALIBRATION_CHARACTERS])
        rows = scored(artifacts(folder, train, arguments.qat), text, arguments.chunks)
        codes = {}
        for name, given in (
            (BASE, ("--method", "rtn")),
            ("minimum error", ()),
            ("GPTQ", ("--calibrate", train)),
        ):
            codes[name] = folder / f"{name}.safetensors"
            if not codes[name].exists():
                edgekit("quantize", MODEL, "--int4", *given, "-o", codes[name])
        if arguments.qat is not None:
            codes["QAT"] = arguments.qat
        alone = weights_alone(resolve_model(MODEL), codes, text, arguments.chunks)
    record = {"machine": facts(), "rows": rows, "weights_alone": alone}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
