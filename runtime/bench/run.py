"""The benchmark: llama-bench's conventions, one process per artifact, repetitions interleaved.

Random token ids, no tokenization and no sampling in the time, one warm-up per test, a fresh
state per repetition. With several artifacts the repetitions alternate A B A B, so that a change
of the machine's state meets all of them and ratios hold where absolute figures do not.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgekit.common.progress import Steps, no_steps
from edgekit.devices.cpus import default_threads
from edgekit.devices.probe.bandwidth import measure_read_bandwidth
from edgekit.devices.probe.conditions import Conditions, conditions
from edgekit.devices.probe.machine import Machine, probe
from edgekit.errors import EdgekitError
from edgekit.runtime.bench.gates import check_gates
from edgekit.runtime.bench.record import (
    ArtifactResult,
    Bandwidth,
    Interference,
    Memory,
    Record,
    Sample,
    Settings,
    ShapeResult,
    process_facts,
)
from edgekit.runtime.bench.traffic import Holdings, holdings_of
from edgekit.runtime.bench.worker_process import WorkerProcess, worker_processes
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.engine import Threads, check_threads
from edgekit.runtime.model_files import ModelFile, find_model_file
from edgekit.version import __version__

DEFAULT_SEED = 0


def bench(
    artifacts: Sequence[Path],
    prompts: Sequence[int] = (512,),
    generates: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    threads: int | None = None,
    cooldown_s: float = 0.0,
    seed: int = DEFAULT_SEED,
    progress: Steps | None = None,
) -> Record:
    """Measure every artifact at every test and return the record of raw samples.

    An artifact is a folder that `edgekit export` wrote, or what `find_model_file` takes besides.
    A test is each of `prompts` (prefill) and `generates` (decode) at each of `depths`, in tokens;
    0 skips one. `threads` None leaves them to each engine, as `run` does: the physical cores this
    process may use, by its quota, or fewer where that decodes faster;
    `cooldown_s` is slept before every repetition. Raises `EdgekitError` before anything is measured
    for a test that an artifact's context cannot hold, and when an artifact's process dies.
    """
    check_threads(threads)
    machine = probe()
    settings = Settings(
        prompts=tuple(prompts),
        generates=tuple(generates),
        depths=tuple(depths),
        repetitions=repetitions,
        threads=default_threads() if threads is None else threads,
        cooldown_s=cooldown_s,
        seed=seed,
    )
    shapes = plan(prompts, generates, depths)
    check_contexts(artifacts, shapes)
    subjects = _open(artifacts)
    return _run(subjects, shapes, settings, threads, machine, progress or no_steps)


def describe_each(artifacts: Sequence[Path], threads: int | None = None) -> Record:
    """Return the record of no test: what the files say, which no engine has to load for it."""
    check_threads(threads)
    machine, now = probe(), conditions().to_dict()
    used = default_threads() if threads is None else threads
    bandwidth = measure_read_bandwidth(used)
    return Record(
        edgekit_version=__version__,
        timestamp_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.to_dict(),
        settings=Settings((), (), (), 0, used, 0.0, 0),
        conditions_before=now,
        conditions_after=now,
        bandwidth=Bandwidth(bandwidth, bandwidth),
        artifacts=tuple(_described(subject) for subject in _open(artifacts)),
    )


def plan(prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int]) -> list[Shape]:
    """Return the tests in llama-bench's order; raises `EdgekitError` when none is left."""
    tests = [("pp", n) for n in prompts] + [("tg", n) for n in generates]
    shapes = [
        Shape("pp" if kind == "pp" else "tg", tokens, depth)
        for depth in depths
        for kind, tokens in tests
        if tokens
    ]
    if not shapes:
        raise EdgekitError("-p 0 and -n 0 leave nothing to measure: give one of them tokens")
    return list(dict.fromkeys(shapes))


def check_contexts(artifacts: Sequence[Path], shapes: Sequence[Shape]) -> None:
    """Refuse a test that an artifact's context cannot hold, as far as files say it unopened.

    Raises `EdgekitError` for what is no model file, too.
    """
    for name, path in zip(distinct_names(artifacts), artifacts, strict=True):
        file = find_model_file(path)
        if file.longest is not None:
            _check_context(name, file, shapes, file.longest)


@dataclass(frozen=True)
class _Subject:
    """A model file, under the name that tables and errors give it."""

    name: str
    file: ModelFile
    holdings: Holdings


@dataclass(frozen=True)
class _Step:
    """One repetition to come: of which subject, of which test."""

    subject: int
    shape: Shape
    warm_up: bool


def _open(paths: Sequence[Path]) -> list[_Subject]:
    if not paths:
        raise EdgekitError("bench needs at least one artifact folder")
    files = [find_model_file(path) for path in paths]
    return [
        _Subject(name, file, holdings_of(file))
        for name, file in zip(distinct_names(paths), files, strict=True)
    ]


def _described(subject: _Subject) -> ArtifactResult:
    return ArtifactResult(
        **_file_facts(subject),
        context=subject.file.longest,
        engine=subject.file.engine,
        engine_version=None,
        affinity=(),
        import_ns=None,
        load_ns=None,
        memory=Memory(peak=None, before_load=None),
        tests=(),
    )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name artifacts by folder; by path where folders share a name; numbered where paths do."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _check_context(name: str, file: ModelFile, shapes: Sequence[Shape], longest: int) -> None:
    for shape in shapes:
        if shape.positions > longest:
            option = "-p" if shape.kind == "pp" else "-n"
            at = f" at -d {shape.depth}" if shape.depth else ""
            again = "" if file.manifest is None else ", or export with a larger --context"
            raise EdgekitError(
                f"{name}: {option} {shape.tokens}{at} needs {shape.positions} positions "
                f"but the artifact's context is {longest}: ask for less{again}"
            )


def _steps(subjects: int, shapes: Sequence[Shape], repetitions: int) -> Iterator[_Step]:
    """Yield per test: a warm-up of every subject, then the subjects in turn, again and again."""
    for shape in shapes:
        for round_ in range(repetitions + 1):
            for subject in range(subjects):
                yield _Step(subject, shape, warm_up=round_ == 0)


def _run(
    subjects: Sequence[_Subject],
    shapes: Sequence[Shape],
    settings: Settings,
    threads: int | None,
    machine: Machine,
    progress: Steps,
) -> Record:
    started = datetime.now(UTC)
    before = conditions()
    progress(0, 1, "read bandwidth")
    bandwidth_before = measure_read_bandwidth(settings.threads)
    with worker_processes([subject.name for subject in subjects]) as workers:
        loads = [
            _load(subject, worker, shapes, threads)
            for subject, worker in zip(subjects, workers, strict=True)
        ]
        samples = _measure(subjects, workers, shapes, settings, progress)
        peaks = [worker.peak_bytes for worker in workers]
    bandwidth = Bandwidth(bandwidth_before, measure_read_bandwidth(settings.threads))
    return Record(
        edgekit_version=__version__,
        timestamp_utc=started.isoformat(timespec="seconds"),
        machine=machine.to_dict(),
        settings=settings,
        conditions_before=before.to_dict(),
        conditions_after=conditions().to_dict(),
        bandwidth=bandwidth,
        artifacts=tuple(
            _artifact_result(subject, load, peak, results)
            for subject, load, peak, results in zip(subjects, loads, peaks, samples, strict=True)
        ),
    )


def _load(
    subject: _Subject, worker: WorkerProcess, shapes: Sequence[Shape], threads: int | None
) -> dict[str, Any]:
    """Load with room for the longest test, where the file's own number is less and leaves it."""
    file = subject.file
    context = file.room(max((shape.positions for shape in shapes), default=0))
    reply = worker.load(file.engine, str(file.path.resolve()), threads, context)
    _check_context(subject.name, file, shapes, reply["context"])
    return reply


def _measure(
    subjects: Sequence[_Subject],
    workers: Sequence[WorkerProcess],
    shapes: Sequence[Shape],
    settings: Settings,
    progress: Steps,
) -> list[list[ShapeResult]]:
    """Run all steps; returns per subject one result per test."""
    start = conditions()
    taken: dict[tuple[int, Shape], list[Sample]] = {}
    steps = list(_steps(len(subjects), shapes, settings.repetitions))
    for done, step in enumerate(steps):
        progress(done, len(steps), f"{step.shape.name} {subjects[step.subject].name}")
        if step.warm_up:
            workers[step.subject].measure(_warm_up(step.shape), settings.seed)
            continue
        time.sleep(settings.cooldown_s)
        order = sum(map(len, taken.values()))
        sample = _sample(workers[step.subject], step.shape, settings.seed, order, start)
        taken.setdefault((step.subject, step.shape), []).append(sample)
    progress(len(steps), len(steps), "read bandwidth")
    return [
        [ShapeResult(shape, tuple(taken[subject, shape])) for shape in shapes]
        for subject in range(len(subjects))
    ]


def _warm_up(shape: Shape) -> Shape:
    """llama-bench warms a prefill by the whole prompt and a decode by one token."""
    return replace(shape, depth=0, tokens=shape.tokens if shape.kind == "pp" else 1)


def _sample(
    worker: WorkerProcess, shape: Shape, seed: int, order: int, start: Conditions
) -> Sample:
    now = conditions()
    reply = worker.measure(shape, seed)
    return Sample(
        order=order,
        elapsed_ns=reply["elapsed_ns"],
        token_ns=tuple(reply["token_ns"]),
        first_token_ns=reply["first_token_ns"],
        interference=Interference(**reply["interference"]),
        gates=check_gates(start, now),
        conditions=now.to_dict(),
    )


def _artifact_result(
    subject: _Subject,
    load: dict[str, Any],
    peak: int | None,
    tests: Sequence[ShapeResult],
) -> ArtifactResult:
    return ArtifactResult(
        **_file_facts(subject),
        context=load["context"],
        threads=Threads(**load["threads"]),
        **process_facts(load, peak),
        tests=tuple(tests),
    )


def _file_facts(subject: _Subject) -> dict[str, Any]:
    """Return the fields of `ArtifactResult` that a file tells unopened."""
    file = subject.file
    return {
        "name": subject.name,
        "path": str(file.place),
        "target": file.engine,
        "model": subject.holdings.model,
        "schemes": subject.holdings.schemes,
        "file_bytes": file.file_bytes,
        "traffic": subject.holdings.traffic,
    }
