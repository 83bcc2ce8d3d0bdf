"""The benchmark of modules: latency of a run, one process per artifact, repetitions interleaved.

A repetition is a burst of runs, as many as take about a tenth of a second, each timed. Inputs are
seeded normal numbers, zeros where they are integers, made outside the time.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit.common.progress import Steps, no_steps
from edgekit.devices.cpus import default_threads
from edgekit.devices.probe.conditions import Conditions, conditions
from edgekit.devices.probe.machine import probe
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import MANIFEST, Artifact
from edgekit.runtime.bench.gates import check_gates
from edgekit.runtime.bench.record import (
    SCHEMA_VERSION,
    Gate,
    InProcess,
    Interference,
    Memory,
    Saved,
    Surrounded,
    paired_ratio,
    percentile,
    process_facts,
    spread,
)
from edgekit.runtime.bench.run import DEFAULT_SEED, distinct_names
from edgekit.runtime.bench.worker_process import WorkerProcess, worker_processes
from edgekit.runtime.engines.engine import check_threads
from edgekit.version import __version__

_BURST_NS = 100_000_000
_MOST_RUNS = 10_000


def all_modules(artifacts: Sequence[Path]) -> bool:
    """Return whether the artifacts are modules; EdgekitError where only some of them are."""
    found = [(path / MANIFEST).is_file() and Artifact.open(path).is_module for path in artifacts]
    if any(found) and not all(found):
        module, other = artifacts[found.index(True)], artifacts[found.index(False)]
        if not other.exists():
            raise EdgekitError(f"{other}: no such file or folder")
        what = "a language model" if (other / MANIFEST).is_file() else "no artifact of a module"
        raise EdgekitError(f"{module} is a module, {other} is {what}: measure them one by one")
    return any(found)


@dataclass(frozen=True)
class ModuleSettings:
    """What was asked of the benchmark; `batch` None is each artifact's own."""

    batch: int | None
    repetitions: int
    threads: int
    cooldown_s: float
    seed: int


@dataclass(frozen=True)
class ModuleSample(Surrounded):
    """One repetition: the duration of each of its runs. `order` is its place in the call."""

    order: int
    run_ns: tuple[int, ...]
    interference: Interference
    gates: tuple[Gate, ...]
    conditions: Mapping[str, Any]

    @property
    def median_ms(self) -> float:
        """Median duration of a run in milliseconds."""
        return statistics.median(self.run_ns) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Return the sample as JSON data."""
        return {
            "order": self.order,
            "run_ns": list(self.run_ns),
            **self.surroundings(),
        }


@dataclass(frozen=True)
class ModuleResult(InProcess):
    """One artifact's identity, its process and its repetitions."""

    name: str
    path: str
    target: str
    model: str
    recipe: str
    file_bytes: int
    batch: int
    engine: str
    engine_version: str
    affinity: tuple[int, ...]
    import_ns: int
    load_ns: int
    memory: Memory
    samples: tuple[ModuleSample, ...]
    engine_built: str | None = None

    @property
    def disturbed(self) -> int:
        """How many repetitions ran beside a visible other load."""
        return sum(sample.interference.visible for sample in self.samples)

    def summary(self) -> dict[str, Any]:
        """Return latencies over all runs, and the spread of the repetitions' medians."""
        runs = [ns / 1e6 for sample in self.samples for ns in sample.run_ns]
        median = statistics.median(runs)
        return {
            "ms": {"median": median, "p95": percentile(runs, 95), "min": min(runs)},
            "repetition_median_ms": spread([sample.median_ms for sample in self.samples]),
            "inputs_per_second": self.batch * 1e3 / median,
            "disturbed_repetitions": self.disturbed,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything known of the artifact as JSON data."""
        return {
            "name": self.name,
            "path": self.path,
            "target": self.target,
            "model": {"id": self.model},
            "recipe": self.recipe,
            "file_bytes": self.file_bytes,
            "batch": self.batch,
            **self.process(),
            "samples": [sample.to_dict() for sample in self.samples],
            "summary": self.summary(),
        }


@dataclass(frozen=True)
class ModuleRecord(Saved):
    """One call of the benchmark: a machine, its conditions, and one result per artifact."""

    edgekit_version: str
    timestamp_utc: str
    machine: Mapping[str, Any]
    settings: ModuleSettings
    conditions_before: Mapping[str, Any]
    conditions_after: Mapping[str, Any]
    artifacts: tuple[ModuleResult, ...]

    def ratios(self) -> list[dict[str, Any]]:
        """Return the speed of every further artifact over the first one's, in inputs."""
        first, *others = self.artifacts
        return [
            {
                "artifact": other.name,
                "against": first.name,
                **paired_ratio(_speeds(other), _speeds(first)),
            }
            for other in others
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as JSON data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "edgekit-module-bench",
            "edgekit_version": self.edgekit_version,
            "timestamp_utc": self.timestamp_utc,
            "machine": dict(self.machine),
            "settings": asdict(self.settings),
            "conditions_before": dict(self.conditions_before),
            "conditions_after": dict(self.conditions_after),
            "artifacts": [artifact.to_dict() for artifact in self.artifacts],
            "ratios": self.ratios(),
        }


def bench_modules(
    artifacts: Sequence[Path],
    batch: int | None = None,
    repetitions: int = 5,
    threads: int | None = None,
    cooldown_s: float = 0.0,
    seed: int = DEFAULT_SEED,
    progress: Steps | None = None,
) -> ModuleRecord:
    """Measure artifacts of modules in turn, repetition by repetition; return the raw samples.

    `batch` is the number of inputs of a run, by default one, or the only one that an artifact
    takes. Raises `EdgekitError` for one that it does not take, and when an artifact's process dies.
    """
    check_threads(threads)
    count = default_threads() if threads is None else threads
    settings = ModuleSettings(batch, repetitions, count, cooldown_s, seed)
    subjects = [
        _Subject(name, Artifact.open(path), batch)
        for name, path in zip(distinct_names(artifacts), artifacts, strict=True)
    ]
    inputs = [subject.inputs() for subject in subjects]
    machine, started, before = probe(), datetime.now(UTC), conditions()
    with worker_processes([subject.name for subject in subjects]) as workers:
        loads = [
            worker.load_module(
                subject.artifact.target, str(subject.artifact.model_path.resolve()), threads
            )
            for subject, worker in zip(subjects, workers, strict=True)
        ]
        samples = _measure(subjects, inputs, workers, settings, progress or no_steps)
        peaks = [worker.peak_bytes for worker in workers]
    return ModuleRecord(
        edgekit_version=__version__,
        timestamp_utc=started.isoformat(timespec="seconds"),
        machine=machine.to_dict(),
        settings=settings,
        conditions_before=before.to_dict(),
        conditions_after=conditions().to_dict(),
        artifacts=tuple(
            subject.result(load, peak, taken)
            for subject, load, peak, taken in zip(subjects, loads, peaks, samples, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Subject:
    """An artifact under the name that tables and errors give it."""

    name: str
    artifact: Artifact
    asked: int | None

    @property
    def batch(self) -> int:
        """Inputs of a run; EdgekitError where the module does not take so many."""
        largest = self.artifact.network.max_batch
        only = self.artifact.network.inputs[0].shape[0]
        if largest is None:
            if self.asked not in (None, only):
                raise EdgekitError(
                    f"{self.name}: takes batches of {only} only, not of --batch {self.asked}: "
                    "export it with --max-batch"
                )
            return only
        if self.asked is not None and self.asked > largest:
            raise EdgekitError(
                f"{self.name}: takes batches of up to {largest}, not of --batch {self.asked}"
            )
        return self.asked or 1

    def inputs(self) -> list[dict[str, Any]]:
        """Return type and shape of each input of a run."""
        batch, varies = self.batch, self.artifact.network.max_batch is not None
        return [
            item.to_json() | {"shape": [batch, *item.shape[1:]] if varies else list(item.shape)}
            for item in self.artifact.network.inputs
        ]

    def result(
        self, load: dict[str, Any], peak: int | None, samples: list[ModuleSample]
    ) -> ModuleResult:
        manifest = self.artifact.network
        return ModuleResult(
            name=self.name,
            path=str(self.artifact.folder),
            target=self.artifact.target,
            model=manifest.model_id,
            recipe=manifest.recipe or "",
            file_bytes=self.artifact.model_path.stat().st_size,
            batch=self.batch,
            **process_facts(load, peak),
            samples=tuple(samples),
        )


def _measure(
    subjects: Sequence[_Subject],
    inputs: Sequence[list[dict[str, Any]]],
    workers: Sequence[WorkerProcess],
    settings: ModuleSettings,
    progress: Steps,
) -> list[list[ModuleSample]]:
    """Warm every artifact up, then take the artifacts in turn, again and again."""
    start, taken = conditions(), [list[ModuleSample]() for _ in subjects]
    total = (settings.repetitions + 1) * len(subjects)
    runs = []
    for number, (subject, worker) in enumerate(zip(subjects, workers, strict=True)):
        progress(number, total, f"warming up {subject.name}")
        warm = worker.run_module(inputs[number], settings.seed, 0, _BURST_NS)["run_ns"]
        runs.append(min(_MOST_RUNS, max(1, _BURST_NS // int(statistics.median(warm)))))
    for repetition in range(settings.repetitions):
        for number, (subject, worker) in enumerate(zip(subjects, workers, strict=True)):
            done = (repetition + 1) * len(subjects) + number
            progress(done, total, subject.name)
            time.sleep(settings.cooldown_s)
            order = done - len(subjects)
            now = conditions()
            reply = worker.run_module(inputs[number], settings.seed, runs[number], 0)
            taken[number].append(_sample(order, reply, start, now))
    progress(total, total, "finishing")
    return taken


def _sample(order: int, reply: dict[str, Any], start: Conditions, now: Conditions) -> ModuleSample:
    return ModuleSample(
        order=order,
        run_ns=tuple(reply["run_ns"]),
        interference=Interference(**reply["interference"]),
        gates=check_gates(start, now),
        conditions=now.to_dict(),
    )


def _speeds(result: ModuleResult) -> list[float]:
    """Return inputs per millisecond of each repetition."""
    return [result.batch / sample.median_ms for sample in result.samples]
