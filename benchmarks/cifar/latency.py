"""How much faster the int8 MobileNet-style net is than its float form, in each engine.

    python -m benchmarks.cifar.latency --out FOLDER [--width 1 --width 8] [-t 1 -t 2] > out.json

Random weights and one picture at a time: speed depends on neither values nor training. Width 1 is
the net of the accuracy table, too thin to be worth more than a call's overhead; at 8 its last
layers have the 1,024 channels of MobileNet v1. Each round runs float and int8 once in every engine,
each in a process of its own: a warm-up, then the median of many calls through edgekit's
`load_module`, copies of input and output included. Every other round goes backwards, so a drift of
the machine favours nobody; a ratio is taken within a round. Prints a table to stderr and JSON with
the raw samples.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.measure import run

QUIET_DEADLINE_SECONDS = 120
BAR = 2.0
SCHEMES = ("float", "w8a8")
TARGETS = ("executorch", "onnx")
WARM_UP_SECONDS, TIMED_SECONDS = 0.5, 2.0


def export(width: float, folder: Path) -> dict[tuple[str, str], Path]:
    """Return the files of one width by target and scheme; those that exist are kept."""
    import torch

    import edgekit
    from benchmarks.cifar.nets import IMAGE, make_net

    torch.manual_seed(0)
    net = make_net("mobilenet", width)
    pictures = torch.randn(8, *IMAGE).split(1)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None  # a plain mean: one batch makes activations of ordinary size
    with torch.no_grad():
        net(torch.randn(32, *IMAGE))
    net.eval()
    found = {}
    for target, scheme in product(TARGETS, SCHEMES):
        path = folder / f"latency-{width:g}-{target}-{scheme}"
        if not path.exists():
            calibration = None if scheme == "float" else pictures
            edgekit.export_module(
                net, (pictures[0],), path, target=target, recipe=scheme, calibration=calibration
            )
        found[target, scheme] = edgekit.Artifact.open(path).model_path
    return found


def one(target: str, path: Path, threads: int) -> dict[str, Any]:
    """Measure one file in this process."""
    import numpy as np

    import edgekit
    from benchmarks.cifar.nets import IMAGE

    picture = np.random.default_rng(0).standard_normal((1, *IMAGE), dtype=np.float32)
    with edgekit.load_module(target, path, threads) as engine:
        found = {"engine": engine.version, "calls": 0, "median_ns": 0.0}
        for seconds in (WARM_UP_SECONDS, TIMED_SECONDS):
            times = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter_ns()
                engine.run([picture])
                times.append(time.perf_counter_ns() - start)
            found |= {"calls": len(times), "median_ns": statistics.median(times)}
    return found


def interleave(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all rounds; a case is a width, an engine and a number of threads."""
    files = {width: export(width, arguments.out) for width in arguments.width}
    cases = list(product(arguments.width, TARGETS, arguments.threads))
    record: dict[str, Any] = {
        "machine": machine.facts(),
        "busy_share_before": [],
        "cases": [
            {"width": width, "engine": target, "threads": threads, **{s: [] for s in SCHEMES}}
            for width, target, threads in cases
        ],
    }
    turns = [(case, scheme) for case in record["cases"] for scheme in SCHEMES]
    for number in range(arguments.repetitions):
        record["busy_share_before"].append(machine.wait_until_quiet(QUIET_DEADLINE_SECONDS))
        print(f"round {number + 1} of {arguments.repetitions}", file=sys.stderr)
        for case, scheme in turns if number % 2 == 0 else turns[::-1]:
            path = files[case["width"]][case["engine"], scheme]
            command = [sys.executable, "-m", "benchmarks.cifar.latency", "--one", str(path)]
            command += ["--engine", case["engine"], "-t", str(case["threads"])]
            case[scheme].append(json.loads(run(command).stdout))
    for case in record["cases"]:
        pairs = zip(*(case[scheme] for scheme in SCHEMES), strict=True)
        case["ratios"] = [a["median_ns"] / b["median_ns"] for a, b in pairs]
    return record


def table(record: dict[str, Any]) -> str:
    """Return the medians, and the ratios with their range and bar."""
    lines = [
        "| width | engine | threads | float ms | int8 ms | float / int8 | range | bar |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in record["cases"]:
        plain, quantized = (
            statistics.median(sample["median_ns"] for sample in case[scheme]) / 1e6
            for scheme in SCHEMES
        )
        ratio = statistics.median(case["ratios"])
        met = "met" if ratio >= BAR else "**missed**"
        lines.append(
            f"| {case['width']:g} | {case['engine']} | {case['threads']} | {plain:.3f} | "
            f"{quantized:.3f} | {ratio:.2f}x | {min(case['ratios']):.2f} to "
            f"{max(case['ratios']):.2f} | >= {BAR:.0f}x {met} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the exported files")
    parser.add_argument("--width", type=float, action="append", help="default: 1, 4 and 8")
    parser.add_argument("-t", "--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--one", type=Path, metavar="FILE", help="one file, one sample")
    parser.add_argument("--engine", choices=TARGETS, help="of --one")
    arguments = parser.parse_args()
    arguments.width = arguments.width or [1.0, 4.0, 8.0]
    arguments.threads = arguments.threads or [1, 2]
    if arguments.one is not None:
        print(json.dumps(one(arguments.engine, arguments.one, arguments.threads[0])))
        return
    if arguments.out is None:
        parser.error("--out FOLDER is needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = interleave(arguments)
    print(table(record), file=sys.stderr)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
