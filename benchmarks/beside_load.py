"""What is left of an artifact's speed while another program keeps every CPU busy.

    python -m benchmarks.beside_load ARTIFACT ... [-o RECORD.json]

An endless loop is pinned to each CPU and takes half of it, so half of the quiet speed is what a
fair share leaves (`--loops` N of them leave one part in N + 1); an engine whose threads wait for
each other actively gets less, because they burn their turns. Quiet and busy repetitions alternate.
The ratio of the medians is the result, the speeds are only what it is made of.
`GOMP_SPINCOUNT=300000` in front shows libgomp's own waiting.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import machine
from edgekit.common.tables import markdown_table
from edgekit.runtime.bench.record import rate
from edgekit.runtime.bench.worker_process import WorkerProcess, worker_processes
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.model_files import find_model_file

SHAPES = (Shape("pp", 128), Shape("tg", 32))
AT_LEAST_NS = 500_000_000  # a short burst may get more than its share of a busy CPU
LOOP = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@contextmanager
def every_cpu_busy(loops_each: int) -> Iterator[None]:
    loops = [
        subprocess.Popen([sys.executable, "-c", LOOP, str(cpu)])
        for cpu in os.sched_getaffinity(0)
        for _ in range(loops_each)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(worker: WorkerProcess, shape: Shape, repetitions: int, loops: int) -> dict[str, Any]:
    def speed() -> float:
        runs = [worker.measure(shape, seed=0)["elapsed_ns"]]
        while sum(runs) < AT_LEAST_NS:
            runs.append(worker.measure(shape, seed=0)["elapsed_ns"])
        return rate(shape.tokens * len(runs), sum(runs))

    speed()  # warms up
    quiet, busy = [], []
    for _ in range(repetitions):
        quiet.append(speed())
        with every_cpu_busy(loops):
            speed()  # lets the scheduler settle
            busy.append(speed())
    left = statistics.median(busy) / statistics.median(quiet)
    return {"test": shape.name, "loops": loops, "quiet": quiet, "busy": busy, "left": left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-l", "--loops", type=int, nargs="+", default=[1, 3], help="on each CPU")
    parser.add_argument("-t", "--threads", type=int, help="for all  [default: each engine's own]")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    results = []
    for path in arguments.artifacts:
        file = find_model_file(path)
        with worker_processes([file.name]) as (worker,):
            model = str(file.path.resolve())
            threads = worker.load(file.engine, model, arguments.threads, None)["threads"]
            for loops, shape in itertools.product(arguments.loops, SHAPES):
                found = measure(worker, shape, arguments.repetitions, loops)
                facts = {"artifact": file.name, "engine": file.engine, "threads": threads}
                results.append(facts | found)
    record = {
        "machine": machine.facts(),
        "busy_share_before": machine.busy_share(),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "results": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    header = ["artifact", "engine", "loops", "test", "quiet tok/s", "busy tok/s", "left", "fair"]
    print(markdown_table(header, [_row(one) for one in results], "llrlrrrr"))


def _row(result: dict[str, Any]) -> list[str]:
    return [
        *(str(result[name]) for name in ("artifact", "engine", "loops", "test")),
        *(f"{statistics.median(result[name]):.1f}" for name in ("quiet", "busy")),
        f"{result['left']:.0%}",
        f"{1 / (result['loops'] + 1):.0%}",
    ]


if __name__ == "__main__":
    main()
