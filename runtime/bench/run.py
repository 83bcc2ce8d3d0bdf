"""The benchmark's one loop: a process per artifact, repetitions interleaved.

With several artifacts the repetitions alternate A B A B, so that a change of the machine's state
meets all of them and ratios hold where absolute figures do not. What is measured of an artifact
is its `Workload`: `decoder.py` has those of language models, `network.py` those of networks.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

from edgekit.common.progress import Steps
from edgekit.devices.hosts.host import Host, boot_id
from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.devices.probe.conditions import Conditions, conditions
from edgekit.devices.probe.machine import Machine, probe
from edgekit.errors import EdgekitError
from edgekit.runtime.bench.gates import check_gates
from edgekit.runtime.bench.record import ArtifactResult, Bandwidth, Record, Sample, Settings
from edgekit.runtime.bench.replies import Loaded, Times
from edgekit.runtime.bench.worker_process import WorkerProcess, worker_processes
from edgekit.runtime.engines.engine import check_threads
from edgekit.version import __version__

DEFAULT_SEED = 0


class Test(Protocol):
    """Something to time again and again; the tests of all artifacts have the same names."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def warm_up(self, worker: WorkerProcess, seed: int) -> None:
        """Run it once, untimed."""
        ...

    def time(self, worker: WorkerProcess, seed: int) -> Times:
        """Run one repetition."""
        ...


Result = TypeVar("Result", bound=ArtifactResult)
Result_co = TypeVar("Result_co", bound=ArtifactResult, covariant=True)


class Workload(Protocol[Result_co]):
    """What is measured of one artifact; `name` is what tables and errors call it."""

    @property
    def name(self) -> str:
        """The name that distinguishes it from the others."""
        ...

    @property
    def tests(self) -> Sequence[Test]:
        """The tests in their order."""
        ...

    def load(self, worker: WorkerProcess, host: Host, threads: int | None) -> Loaded:
        """Bring the artifact to the host and load it there."""
        ...

    def result(
        self, loaded: Loaded, peak: int | None, samples: Sequence[tuple[Sample, ...]]
    ) -> Result_co:
        """Return what is recorded, of the samples of each test."""
        ...


@dataclass(frozen=True)
class _Step:
    """One repetition to come: of which artifact, of which of its tests."""

    artifact: int
    test: int
    warm_up: bool


def probed(host: Host, threads: int | None) -> Machine:
    """Return the facts of a machine, once it is known to take so many threads."""
    machine = probe(host)
    check_threads(threads, machine.logical_cores)
    return machine


def run(
    workloads: Sequence[Workload[Result]],
    machine: Machine,
    settings: Settings,
    threads: int | None,
    host: Host,
    progress: Steps,
    *,
    bandwidth: bool,
) -> Record[Result]:
    """Measure every artifact at each of its tests on a host.

    `threads` None leaves them to the engines. With `bandwidth` that of the memory is measured
    before and after. Raises `EdgekitError` when an artifact's process dies.
    """
    started, before, boot = datetime.now(UTC), conditions(host), boot_id(host)
    measured = []
    if bandwidth:
        progress(0, 1, "read bandwidth")
        measured.append(read_bandwidth(host, settings.threads))
    with worker_processes([workload.name for workload in workloads], host) as workers:
        loads = [
            workload.load(worker, host, threads)
            for workload, worker in zip(workloads, workers, strict=True)
        ]
        samples = _measure(workloads, workers, settings, host, progress)
        peaks = [worker.peak_bytes for worker in workers]
    if bandwidth:
        measured.append(read_bandwidth(host, settings.threads))
    if boot_id(host) != boot:
        raise EdgekitError(f"{host.name} was started anew in the middle: measure again")
    return Record(
        edgekit_version=__version__,
        timestamp_utc=started.isoformat(timespec="seconds"),
        machine=machine.to_dict(),
        settings=settings,
        conditions_before=before.to_dict(),
        conditions_after=conditions(host).to_dict(),
        bandwidth=Bandwidth(*measured) if bandwidth else None,
        artifacts=tuple(
            workload.result(loaded, peak, taken)
            for workload, loaded, peak, taken in zip(workloads, loads, peaks, samples, strict=True)
        ),
    )


def read_bandwidth(host: Host, threads: int) -> ReadBandwidth:
    """Measure in a process that ends with it, for its buffer is large."""
    with worker_processes([host.name], host) as (worker,):
        return worker.read_bandwidth(threads)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name artifacts by folder; by path where folders share a name; numbered where paths do."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _steps(artifacts: int, tests: int, repetitions: int) -> Iterator[_Step]:
    """Yield per test: a warm-up of every artifact, then the artifacts in turn, again and again."""
    for test in range(tests):
        for round_ in range(repetitions + 1):
            for artifact in range(artifacts):
                yield _Step(artifact, test, warm_up=round_ == 0)


def _measure(
    workloads: Sequence[Workload[Result]],
    workers: Sequence[WorkerProcess],
    settings: Settings,
    host: Host,
    progress: Steps,
) -> list[list[tuple[Sample, ...]]]:
    """Run all steps; returns per artifact the samples of each test."""
    start = conditions(host)
    count = len(workloads[0].tests)
    taken = [[list[Sample]() for _ in range(count)] for _ in workloads]
    steps = list(_steps(len(workloads), count, settings.repetitions))
    order = 0
    for done, step in enumerate(steps):
        workload, worker = workloads[step.artifact], workers[step.artifact]
        test = workload.tests[step.test]
        progress(done, len(steps), f"{test.name} {workload.name}")
        if step.warm_up:
            test.warm_up(worker, settings.seed)
            continue
        time.sleep(settings.cooldown_s)
        now = conditions(host)
        times = test.time(worker, settings.seed)
        taken[step.artifact][step.test].append(_sample(order, times, start, now))
        order += 1
    progress(len(steps), len(steps), "finishing")
    return [[tuple(samples) for samples in tests] for tests in taken]


def _sample(order: int, times: Times, start: Conditions, now: Conditions) -> Sample:
    return Sample(
        order=order,
        elapsed_ns=times.elapsed,
        each_ns=times.each,
        first_token_ns=times.first_token,
        interference=times.interference,
        gates=check_gates(start, now),
        conditions=now.to_dict(),
    )
