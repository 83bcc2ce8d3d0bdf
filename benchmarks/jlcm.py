"""Codebooks of lfm2-tiny, step by step: what each step of the JLCM reconstruction gains.

    python -m benchmarks.jlcm [--rows cb3 ...] [-o benchmarks/results/jlcm-lfm2-tiny.json]

A row is a method at a scheme, such as `jlcm:cb3`; `--rows` names some, a scheme alone all methods
that it has; without it those of the table are run, one after the other. Nothing is drawn at random.
The rows that are in the output already are kept.

Methods: `rtn` (uniform grid, range of minimum and maximum), `mse` (range of least squared error),
`gptq`, `kmeans`, `weighted` (by the Hessian's diagonal), `ordinary` and `proximal` (learned with
either gradient), `jlcm` (proximal, then coordinate descent). With several codebooks, like neurons
are gathered first; `jlcm:cb3x8:unordered` leaves them where they are. What calibrates is what
`edgekit quantize --calibrate train.txt` calibrates on, what is scored is valid.txt, by the
conventions of `edgekit eval`, in torch with activations as they are. Bits per weight are of the
layers' matrices as they lie on disk: indices, scales, codebooks; embedding and head are int8 in
every row.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import facts
from benchmarks.report import table
from edgekit.models.eager import float_reader
from edgekit.models.layerwise import layer_codes
from edgekit.models.reorder import grouped_orders, reordered
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.codebook.jlcm import jlcm, weighted_kmeans
from edgekit.quantize.codebook.learn import Learning
from edgekit.quantize.gptq import gptq
from edgekit.quantize.recipe import Recipe, in_layers, resolve, uniform, with_ranges
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.quantize.tensor import QuantizedTensor, Weight
from edgekit.runtime.evaluation.evaluate import cut, tokenize
from edgekit.workflows.calibrate import CHUNK, MOST_CHUNKS, is_linear, read_texts
from edgekit.workflows.gains import measure

MODEL = "lfm2-tiny"
METHODS: dict[str, Callable[..., QuantizedTensor] | None] = {
    "rtn": None,
    "mse": None,
    "gptq": gptq,
    "kmeans": None,
    "weighted": weighted_kmeans,
    "ordinary": partial(jlcm, learning=Learning(gradient="ordinary"), rounds=0),
    "proximal": partial(jlcm, learning=Learning(gradient="proximal"), rounds=0),
    "jlcm": jlcm,
}
CODEBOOKS = ("kmeans", "weighted", "ordinary", "proximal", "jlcm")
ROWS = (
    *(f"{method}:{scheme}" for scheme in ("w4", "w4g32") for method in ("rtn", "mse", "gptq")),
    *(f"{method}:{scheme}" for scheme in ("cb4", "cb3", "cb2") for method in CODEBOOKS),
    *("kmeans:cb3x8:unordered", "jlcm:cb3x8:unordered"),
    *(
        f"{method}:{scheme}"
        for scheme in ("cb3x8", "cb3g64", "cb4nl")
        for method in ("kmeans", "weighted", "jlcm")
    ),
)
"""What is run without --rows."""


def chunks(source: ModelSource, path: Path, count: int, size: int = CHUNK) -> list[list[int]]:
    """Return the first chunks of a text, of `size` tokens each."""
    assert source.folder is not None
    tokenizer = Tokenizer.load(source.folder)
    text = path.read_text()[: 8 * count * size]
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    return cut(tokenize(tokenizer, text), size, count, bos)


def recipe_of(method: str, scheme: Scheme) -> Recipe:
    """Return the recipe of a row: the scheme for all linears, ranges as `edgekit quantize` has."""
    return with_ranges(uniform(scheme), "rtn" if method == "rtn" else "mse")


def quantized(source: ModelSource, row: str, texts: list[list[int]]) -> dict[str, Weight]:
    """Return the weights of a row."""
    method, scheme, *unordered = row.split(":")
    shapes, tied = source.config.tied_shapes()
    rows = resolve(recipe_of(method, parse_scheme(scheme)), shapes, tied)
    read: Callable[[str], Tensor] = float_reader(source.config, source.checkpoint)
    if not unordered:
        architecture = source.config.architecture
        read = reordered(architecture, read, grouped_orders(architecture, rows, read))
    choose = METHODS[method]
    # A text decides the codes of the layers' linears, so those are not rounded first.
    simple = [row for row in rows if choose is None or not is_linear(row)]
    weights: dict[str, Weight] = dict(quantize_tensors(replace(rows, rows=simple), read))
    if choose is not None:
        weights |= layer_codes(
            source.config.architecture, rows, read, weights.__getitem__, texts, choose
        )
    return weights


def bits_per_weight(weights: dict[str, Weight]) -> float:
    """Return the bits of the layers' matrices on disk over the number of their weights."""
    found = [
        weight
        for name, weight in weights.items()
        if isinstance(weight, QuantizedTensor) and in_layers(name)
    ]
    return 8 * sum(each.nbytes for each in found) / sum(each.codes.numel() for each in found)


def measured(
    source: ModelSource, row: str, texts: list[list[int]], held_out: list[list[int]]
) -> dict[str, Any]:
    """Quantize a row's way and score it."""
    start = time.process_time()
    weights = quantized(source, row, texts)
    seconds = time.process_time() - start
    read = float_reader(source.config, source.checkpoint)
    gains = measure(
        source.config, read, {row: lambda: weights}, held_out, lambda done, total, label: None
    )
    return {
        "row": row,
        "bits_per_weight": bits_per_weight(weights),
        "kld": gains.steps[0].kld.to_dict(),
        "perplexity": gains.steps[0].perplexity.to_dict(),
        "reference_perplexity": gains.reference_perplexity.to_dict(),
        "scored_tokens": gains.tokens,
        "calibration_tokens": 0 if METHODS[row.partition(":")[0]] is None else sum(map(len, texts)),
        "cpu_seconds": round(seconds, 1),
    }


def wanted(names: Iterable[str]) -> list[str]:
    """Return the rows that are meant: rows, and schemes of which all rows are meant.

    SystemExit for a method that is none, or not one of the row's scheme.
    """
    rows = []
    for name in names:
        method, *rest = name.split(":")
        scheme = parse_scheme(rest[0] if rest else name)
        methods = methods_of(scheme)
        if not rest:
            rows += [f"{each}:{name}" for each in methods]
        elif method in methods:
            rows.append(name)
        else:
            raise SystemExit(f"--rows {name}: methods of {scheme.name} are {', '.join(methods)}")
    return rows


def methods_of(scheme: Scheme) -> tuple[str, ...]:
    """Return the methods that a scheme has; at 8 bits `mse` finds the ranges that `rtn` does."""
    if isinstance(scheme, Codebook):
        return CODEBOOKS
    if scheme.is_float:
        return ("rtn",)
    return ("rtn", "gptq") if scheme.bits == 8 else ("rtn", "mse", "gptq")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    cells = [
        [
            row["row"].partition(":")[2].replace(":", ", "),
            row["row"].partition(":")[0],
            f"{row['bits_per_weight']:.3f}",
            f"{row['kld']['value']:.4f} ± {row['kld']['error']:.4f}",
            f"{row['perplexity']['value']:.3f}",
        ]
        for row in rows
    ]
    return table(("scheme", "method", "bits per weight", "mean KLD", "perplexity"), cells)


def run(
    rows: Iterable[str],
    measure_row: Callable[[str], dict[str, Any]],
    show: Callable[[list[dict[str, Any]]], str],
    record: dict[str, Any],
    output: Path | None,
) -> None:
    """Add rows to a record, which is written after each, and print its table."""
    for row in rows:
        record["rows"].append(measure_row(row))
        print(show(record["rows"][-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if output is not None:
            output.write_text(json.dumps(record, indent=1) + "\n")
    print(show(record["rows"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stories", type=Path, default=Path("../shared/data/stories"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--calibrate", type=int, default=MOST_CHUNKS, help="Chunks of 256 tokens, at most that many"
    )
    parser.add_argument("--score", type=int, default=32, help="Chunks of 256 tokens")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = resolve_model(MODEL)
    texts = read_texts(source, arguments.stories / "train.txt").calibration[: arguments.calibrate]
    held_out = chunks(source, arguments.stories / "valid.txt", arguments.score)
    record: dict[str, Any] = {"machine": facts(), "rows": []}
    if arguments.output is not None and arguments.output.exists():
        record["rows"] = json.loads(arguments.output.read_text())["rows"]
    done = {row["row"] for row in record["rows"]}
    rows = [row for row in wanted(arguments.rows) if row not in done]
    run(
        rows, lambda row: measured(source, row, texts, held_out), markdown, record, arguments.output
    )


if __name__ == "__main__":
    main()
