"""The benchmark of networks: latency of a run.

A repetition is a burst of runs, as many as take about a tenth of a second, each timed. Inputs are
seeded normal numbers, zeros where they are integers, made outside the time.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from edgekit.common.progress import Steps, no_steps
from edgekit.devices.cpus import default_threads
from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.read import MANIFEST, Artifact
from edgekit.runtime.bench.record import (
    ArtifactResult,
    Bandwidth,
    Record,
    Repetitions,
    Sample,
    Settings,
    percentile,
    spread,
)
from edgekit.runtime.bench.replies import Loaded, Times
from edgekit.runtime.bench.run import DEFAULT_SEED, distinct_names, probed, run
from edgekit.runtime.bench.worker_process import WorkerProcess

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
class BurstResult(Repetitions):
    """All bursts of runs of one network."""

    batch: int
    samples: tuple[Sample, ...]

    name: ClassVar[str] = "run"

    @property
    def medians_ms(self) -> list[float]:
        """Median duration of a run in each repetition, in milliseconds."""
        return [statistics.median(sample.each_ns) / 1e6 for sample in self.samples]

    @property
    def rates(self) -> list[float]:
        """Inputs per second of each repetition's median run."""
        return [self.batch * 1e3 / median for median in self.medians_ms]

    def summary(self) -> dict[str, Any]:
        """Return latencies over all runs, and the spread of the repetitions' medians."""
        runs = [ns / 1e6 for sample in self.samples for ns in sample.each_ns]
        median = statistics.median(runs)
        return {
            "ms": {"median": median, "p95": percentile(runs, 95), "min": min(runs)},
            "repetition_median_ms": spread(self.medians_ms),
            "inputs_per_second": self.batch * 1e3 / median,
            "disturbed_repetitions": self.disturbed,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the raw samples and what follows from them."""
        return {
            "samples": [
                {"order": one.order, "run_ns": list(one.each_ns), **one.surroundings()}
                for one in self.samples
            ],
            "summary": self.summary(),
        }


@dataclass(frozen=True, kw_only=True)
class NetworkResult(ArtifactResult):
    """A network's identity, and the bursts of its runs, which are its only test."""

    kind: ClassVar[str] = "edgekit-module-bench"

    model: str
    recipe: str
    batch: int
    tests: tuple[BurstResult, ...]

    def to_dict(self, bandwidth: Bandwidth | None) -> dict[str, Any]:
        """Return everything known of the artifact as JSON data."""
        (bursts,) = self.tests
        return {
            "name": self.name,
            "path": self.path,
            "target": self.target,
            "model": {"id": self.model},
            "recipe": self.recipe,
            "file_bytes": self.file_bytes,
            "batch": self.batch,
            **self.process(),
            **bursts.to_dict(),
        }


def bench_modules(
    artifacts: Sequence[Path],
    batch: int | None = None,
    repetitions: int = 5,
    threads: int | None = None,
    cooldown_s: float = 0.0,
    seed: int = DEFAULT_SEED,
    host: Host = LOCAL,
    progress: Steps | None = None,
) -> Record[NetworkResult]:
    """Measure artifacts of networks in turn, repetition by repetition; return the raw samples.

    `batch` is the number of inputs of a run, by default one, or the only one that an artifact
    takes. The artifacts lie here; they are brought to `host` and run there. Raises `EdgekitError`
    for a batch that an artifact does not take, and when its process dies.
    """
    machine = probed(host, threads)
    used = default_threads(host) if threads is None else threads
    settings = Settings({"batch": batch}, repetitions, used, cooldown_s, seed)
    workloads = [
        _Network(name, Artifact.open(path), batch)
        for name, path in zip(distinct_names(artifacts), artifacts, strict=True)
    ]
    for workload in workloads:
        _ = workload.tests  # refuses a batch before anything is started
    show = progress or no_steps
    return run(workloads, machine, settings, threads, host, show, bandwidth=False)


@dataclass
class _Bursts:
    """As many runs as take about a tenth of a second, which the warm-up tells."""

    inputs: list[dict[str, Any]]
    runs: int = field(default=1, init=False)
    name: ClassVar[str] = "run"

    def warm_up(self, worker: WorkerProcess, seed: int) -> None:
        once = statistics.median(worker.time_network(self.inputs, seed, 0, _BURST_NS).each)
        self.runs = min(_MOST_RUNS, max(1, _BURST_NS // max(1, int(once))))

    def time(self, worker: WorkerProcess, seed: int) -> Times:
        return worker.time_network(self.inputs, seed, self.runs, 0)


@dataclass(frozen=True)
class _Network:
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
                    f"{self.name}: takes batches of {only} only, not of `batch` {self.asked}: "
                    "export it with `max_batch`"
                )
            return only
        if self.asked is not None and self.asked > largest:
            raise EdgekitError(
                f"{self.name}: takes batches of up to {largest}, not of `batch` {self.asked}"
            )
        return self.asked or 1

    @cached_property
    def tests(self) -> tuple[_Bursts]:
        """Bursts of runs on inputs of the type and the shape of each."""
        batch, varies = self.batch, self.artifact.network.max_batch is not None
        inputs = [
            item.to_json() | {"shape": [batch, *item.shape[1:]] if varies else list(item.shape)}
            for item in self.artifact.network.inputs
        ]
        return (_Bursts(inputs),)

    def load(self, worker: WorkerProcess, host: Host, threads: int | None) -> Loaded:
        """Bring the artifact to the host and load its model there."""
        artifact = self.artifact
        place = host.put(artifact.folder, [MANIFEST, *artifact.manifest.files])
        model = f"{place}/{artifact.manifest.file}"
        return worker.load_network(artifact.target, model, threads)

    def result(
        self, loaded: Loaded, peak: int | None, samples: Sequence[tuple[Sample, ...]]
    ) -> NetworkResult:
        """Return what is recorded."""
        manifest = self.artifact.network
        return NetworkResult(
            name=self.name,
            path=str(self.artifact.folder),
            target=self.artifact.target,
            model=manifest.model_id,
            recipe=manifest.recipe or "",
            file_bytes=self.artifact.model_path.stat().st_size,
            batch=self.batch,
            **loaded.facts(peak),
            tests=tuple(BurstResult(self.batch, taken) for taken in samples),
        )
