"""Whether static w8a8 pays for LFM2: speed of its blocks in the engines, divergence of lfm2-tiny.

    python -m benchmarks.lfm2_static --stories ../shared/data/stories
        [-o benchmarks/results/lfm2-static.json]

Speed: stacks of the three kinds of LFM2-350M's blocks with random weights (`lfm2_blocks.py`), at
512 tokens and at one, one thread. Contenders are today's dynamic int8, static w8a8 as
`edgekit.export` makes it of a module, and of convolution blocks also static conv1d between dynamic
linears. All are loaded in one process and called in turn, every other round backwards; a ratio is
taken within a round. Before each call more memory is read than a last-level cache holds, so that
weights come from memory, as those of a model do.

Quality: lfm2-tiny in torch (`lfm2_static_quality.py`), mean KLD from the float model.

Static pays for a kind of block in an engine where it is at least 5 % faster there, at 512 tokens
or at one, and adds less divergence than int8 has today.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.lfm2_blocks import (
    COUNTS,
    DYNAMIC,
    STATIC,
    STATIC_CONV,
    TARGETS,
    contenders,
    inputs,
    write,
)
from benchmarks.lfm2_static_quality import TODAY, measure
from benchmarks.report import table
from edgekit.runtime.engines.network_engine import load_module

TOKENS = (512, 1)
CALLS = {512: 1, 1: 9}
"""Calls of each contender in a round, whose median is the round's sample."""
WARM_UP_CALLS = 2
CACHE = np.ones(8 << 20, np.int64)
"""More than a last-level cache holds."""
QUIET_DEADLINE_SECONDS = 60
FASTER = 1.05
ENGINES = {"executorch": "ExecuTorch", "onnx": "ONNX Runtime"}
COST = {
    (STATIC, "convolution"): "static convolution blocks, conv1d included",
    (STATIC, "feed-forward"): "static feed-forwards",
    (STATIC, "attention"): "static projections of attention",
    (STATIC_CONV, "convolution"): "static conv1d",
}
"""The row of the quality table for each contender; with `, mse` where ranges are of least error."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_all(folder: Path) -> dict[tuple[str, str, int, str], Path]:
    """Write every file that `folder` does not hold yet."""
    found = {}
    for target in TARGETS:
        for kind in COUNTS:
            for tokens in TOKENS:
                for contender in contenders(kind, target):
                    name = f"{target} {kind} {tokens} {contender}".replace(" ", "-")
                    marker = folder / f"{name}.path"
                    if not marker.exists():
                        start = time.monotonic()
                        path = write(kind, contender, target, tokens, folder / name)
                        marker.write_text(str(path.relative_to(folder)))
                        say(f"{name}: {time.monotonic() - start:.0f} s")
                    found[target, kind, tokens, contender] = folder / marker.read_text()
    return found


def time_case(files: dict[str, Path], target: str, kind: str, tokens: int, rounds: int) -> dict:
    """Return the samples of each contender, one a round, in nanoseconds."""
    given = [item.numpy() for item in inputs(kind, tokens)]
    samples: dict[str, list[float]] = {name: [] for name in files}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(load_module(target, path, threads=1))
            for name, path in files.items()
        }
        for _ in range(WARM_UP_CALLS):
            for engine in engines.values():
                engine.run(given)
        for number in range(rounds):
            turn = list(engines.items())[:: 1 if number % 2 == 0 else -1]
            times: dict[str, list[int]] = {name: [] for name in files}
            for _ in range(CALLS[tokens]):
                for name, engine in turn:
                    CACHE.sum()
                    start = time.perf_counter_ns()
                    engine.run(given)
                    times[name].append(time.perf_counter_ns() - start)
            for name, found in times.items():
                samples[name].append(median(found))
    return samples


def speeds(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the record of every case."""
    files = write_all(folder)
    busy = machine.wait_until_quiet(QUIET_DEADLINE_SECONDS)
    cases = []
    for target in TARGETS:
        for kind, blocks in COUNTS.items():
            for tokens in TOKENS:
                own = {name: files[target, kind, tokens, name] for name in contenders(kind, target)}
                say(f"{target}, {kind}, {tokens} tokens")
                samples = time_case(own, target, kind, tokens, rounds)
                case = {"engine": target, "kind": kind, "tokens": tokens, "blocks": blocks}
                cases.append({**case, "samples_ns": samples})
    return {"busy_share_before": busy, "busy_share_after": machine.busy_share(), "cases": cases}


def ratios(case: dict[str, Any], contender: str) -> list[float]:
    """Return dynamic over the contender, round by round: above 1 the contender is faster."""
    samples = case["samples_ns"]
    pairs = zip(samples[DYNAMIC], samples[contender], strict=True)
    return [dynamic / other for dynamic, other in pairs]


def speed_table(record: dict[str, Any]) -> str:
    rows = []
    for case in record["cases"]:
        block_ms = {
            name: median(found) / 1e6 / case["blocks"] for name, found in case["samples_ns"].items()
        }
        for contender in contenders(case["kind"], case["engine"])[1:]:
            found = ratios(case, contender)
            rows.append(
                [
                    ENGINES[case["engine"]],
                    case["kind"],
                    str(case["tokens"]),
                    contender,
                    f"{block_ms[DYNAMIC]:.3f}",
                    f"{block_ms[contender]:.3f}",
                    f"{median(found):.2f}x",
                    f"{min(found):.2f} to {max(found):.2f}",
                ]
            )
    columns = ("engine", "block", "tokens", "contender", "dynamic ms", "its ms", "faster", "range")
    return table(columns, rows)


def quality_table(record: dict[str, Any]) -> str:
    today = kld(record, TODAY)
    rows = [
        [
            row["row"],
            f"{row['kld']['value']:.6f} ± {row['kld']['error']:.6f}",
            f"{row['kld']['value'] / today:.2f}x",
            f"{row['perplexity']['value']:.3f}",
            f"{row['same_top']['value']:.2%}",
        ]
        for row in record["rows"]
    ]
    columns = ("activations", "mean KLD", "of today's", "perplexity", "same top-1")
    reference = record["reference_perplexity"]["value"]
    scope = (
        f"{record['tokens']:,} tokens scored, ranges from {record['calibration_tokens']:,}; "
        f"the float model's perplexity: {reference:.3f}"
    )
    return f"{table(columns, rows)}\n\n{scope}"


def kld(record: dict[str, Any], name: str) -> float:
    return next(row["kld"]["value"] for row in record["rows"] if row["row"] == name)


def verdict_table(record: dict[str, Any]) -> str:
    """Say for each contender, kind and engine whether static pays."""
    quality, today = record["quality"], kld(record["quality"], TODAY)
    rows = []
    for (contender, kind), name in COST.items():
        added = min(kld(quality, each) for each in (name, f"{name}, mse")) - today
        for target in TARGETS:
            cases = [
                case
                for case in record["speed"]["cases"]
                if (case["engine"], case["kind"]) == (target, kind)
            ]
            found = {case["tokens"]: median(ratios(case, contender)) for case in cases}
            pays = max(found.values()) >= FASTER and added < today
            rows.append(
                [
                    f"{contender}, {kind}",
                    ENGINES[target],
                    *(f"{found[tokens]:.2f}x" for tokens in TOKENS),
                    f"{added:+.6f}",
                    f"{added / today:+.2f}x",
                    "**pays**" if pays else "no",
                ]
            )
    columns = ("static", "engine", "512 tokens", "1 token", "KLD added", "of int8's", "pays")
    return table(columns, rows)


def markdown(record: dict[str, Any]) -> str:
    """Return the three tables."""
    parts = []
    if "speed" in record:
        parts.append(speed_table(record["speed"]))
    if "quality" in record:
        parts.append(quality_table(record["quality"]))
    if len(parts) == 2:
        parts.append(verdict_table(record))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stories", type=Path, default=Path("../shared/data/stories"))
    parser.add_argument("--chunks", type=int, default=16, help="scored")
    parser.add_argument("--calibrate", type=int, default=32, help="chunks that ranges are from")
    parser.add_argument("-r", "--repetitions", type=int, default=11)
    parser.add_argument("--work", type=Path, help="Folder for the files, kept and reused")
    parser.add_argument("--only", choices=("speed", "quality", "files"))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": machine.facts(), "threads": 1}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.work or Path(scratch)
        folder.mkdir(exist_ok=True)
        if arguments.only == "files":
            write_all(folder)
            return
        if arguments.only != "quality":
            record["speed"] = speeds(folder, arguments.repetitions)
    if arguments.only != "speed":
        record["quality"] = measure(arguments.stories, arguments.chunks, arguments.calibrate, say)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
