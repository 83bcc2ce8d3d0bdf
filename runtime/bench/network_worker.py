"""The part of the benchmark's worker that runs modules: loading one, timing a burst of runs."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.runtime.bench.accounting import Clocks, interference, peak_bytes
from edgekit.runtime.engines.first_load import check_first_load
from edgekit.runtime.engines.network_engine import (
    Array,
    ModuleEngine,
    import_module_engine,
    load_module,
)

_FEWEST_WARM_UPS = 3


def load(target: str, model: str, threads: int | None) -> tuple[ModuleEngine, dict[str, Any]]:
    """Open a module's file; return the engine and the worker's reply."""
    check_first_load(target)
    started = time.perf_counter_ns()
    import_module_engine(target)  # so that the engine's libraries are not in the time to load
    imported = time.perf_counter_ns()
    before = peak_bytes(os.getpid())
    begin = time.perf_counter_ns()
    engine = load_module(target, Path(model), threads)
    return engine, {
        "load_ns": time.perf_counter_ns() - begin,
        "import_ns": imported - started,
        "before_load_bytes": before,
        "engine": engine.name,
        "version": engine.version,
        "threads": engine.threads,
        "affinity": sorted(os.sched_getaffinity(0)),
    }


def time_runs(
    engine: ModuleEngine,
    inputs: list[dict[str, Any]],
    seed: int,
    runs: int,
    at_least_ns: int,
) -> dict[str, Any]:
    """Run the module `runs` times, or until so much time has passed; time each run."""
    arrays = random_inputs(inputs, seed)
    durations: list[int] = []
    before = Clocks.read()
    while len(durations) < max(runs, _FEWEST_WARM_UPS if at_least_ns else 1) or (
        sum(durations) < at_least_ns
    ):
        begin = time.perf_counter_ns()
        engine.run(arrays)
        durations.append(time.perf_counter_ns() - begin)
    shares = interference(before, Clocks.read(), engine.threads)
    return {"run_ns": durations, "interference": asdict(shares)}


def random_inputs(inputs: list[dict[str, Any]], seed: int) -> list[Array]:
    """Return seeded normal numbers, and zeros where the module takes integers."""
    generator = np.random.default_rng(seed)
    return [
        generator.standard_normal(item["shape"], dtype=np.float32)
        if item["dtype"] == "float32"
        else np.zeros(item["shape"], item["dtype"])
        for item in inputs
    ]
