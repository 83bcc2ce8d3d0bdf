"""What our `gguf` engine adds to llama.cpp: its speed over llama-bench's, on the same files.

    python -m benchmarks.gguf_engine FILE.gguf [FILE.gguf ...] --llama-bench PATH \\
        [-p 512] [-n 128] [-r 5] [-t 2]

Each round runs every file once in llama-bench and once in our engine (as `edgekit bench` measures
it, logits copied out for every token), each in a process of its own; every other round goes
backwards, so a drift of the machine favours nobody. A ratio is taken within a round. Both sides
must be of one llama.cpp: build_llamacpp.sh takes it from the same sdist. Prints a table to stderr
and JSON with the raw samples to stdout.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.contenders import Contender, Settings, measure
from benchmarks.measure import run

QUIET_DEADLINE_SECONDS = 120
BAR = 0.97  # of decode
OURS, THEIRS = "edgekit", "llama-bench"
TESTS = {"prefill": "prefill_ns", "decode": "decode_ns"}


def one(path: Path, settings: Settings) -> dict[str, Any]:
    """Measure one file in our engine, in this process: a warm-up and a sample of each test."""
    from edgekit.runtime.bench.worker import measure as timed
    from edgekit.runtime.decode_bytes import Shape
    from edgekit.runtime.engines.engine import load_engine

    positions = max(settings.prompt, settings.generate)
    found: dict[str, Any] = {}
    with load_engine("gguf", path, settings.threads, positions) as engine:
        found["engine"] = engine.version
        for name, warm_up, shape in (
            ("prefill_ns", Shape("pp", settings.prompt), Shape("pp", settings.prompt)),
            ("decode_ns", Shape("tg", 1), Shape("tg", settings.generate)),
        ):
            timed(engine, warm_up, 0)
            found[name] = timed(engine, shape, 0)["elapsed_ns"]
    return found


def sample(side: str, path: Path, settings: Settings, llama_bench: Path) -> dict[str, Any]:
    """Run one side once, in a process of its own."""
    if side == THEIRS:
        return asdict(measure(Contender(path.name, "gguf", path), settings, llama_bench))
    finished = run(
        [
            *(sys.executable, "-m", "benchmarks.gguf_engine", str(path), "--one"),
            *("-p", str(settings.prompt), "-n", str(settings.generate)),
            *("-t", str(settings.threads)),
        ]
    )
    peak = {"peak_bytes": finished.cost.peak_process_bytes}
    return json.loads(finished.stdout) | peak


def interleave(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """Return the record of all rounds."""
    turns = [(path, side) for path in arguments.file for side in (THEIRS, OURS)]
    record: dict[str, Any] = {
        "machine": machine.facts(),
        "settings": asdict(settings),
        "busy_share_before": [],
        "samples": {path.name: {THEIRS: [], OURS: []} for path in arguments.file},
    }
    for number in range(arguments.repetitions):
        record["busy_share_before"].append(machine.wait_until_quiet(QUIET_DEADLINE_SECONDS))
        for path, side in turns if number % 2 == 0 else turns[::-1]:
            print(f"round {number + 1}: {path.name} in {side}", file=sys.stderr)
            found = sample(side, path, settings, arguments.llama_bench)
            record["samples"][path.name][side].append(found)
    record["ratios"] = {name: ratios(sides) for name, sides in record["samples"].items()}
    return record


def ratios(sides: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return our speed over theirs, one per round."""
    rounds = list(zip(sides[THEIRS], sides[OURS], strict=True))
    return {
        test: [theirs[key] / ours[key] for theirs, ours in rounds] for test, key in TESTS.items()
    }


def table(record: dict[str, Any]) -> str:
    """Return the medians and ranges of the ratios, and whether decode meets its bar."""
    lines = [
        "| file | test | edgekit / llama-bench | range | bar |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in record["ratios"].items():
        for test, values in found.items():
            median = statistics.median(values)
            met = "met" if median >= BAR else "**missed**"
            bar = f">= {BAR}x {met}" if test == "decode" else ""
            span = f"{min(values):.3f} to {max(values):.3f}"
            lines.append(f"| {name} | {test} | {median:.3f}x | {span} | {bar} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument("--llama-bench", type=Path, metavar="PATH")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="one file in our engine, one sample")
    arguments = parser.parse_args()
    settings = Settings(arguments.prompt, arguments.generate, arguments.threads)
    if arguments.one:
        print(json.dumps(one(arguments.file[0], settings)))
        return
    if arguments.llama_bench is None:
        parser.error("--llama-bench PATH is needed")
    record = interleave(arguments, settings)
    print(table(record), file=sys.stderr)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
