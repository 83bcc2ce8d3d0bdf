"""The benchmark of language models, by llama-bench's conventions.

Random token ids, no tokenization and no sampling in the time, one warm-up per test, a fresh
state per repetition.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from edgekit.common.progress import Steps, no_steps
from edgekit.devices.cpus import default_threads
from edgekit.devices.hosts.host import Host
from edgekit.devices.hosts.local import LOCAL
from edgekit.devices.probe.conditions import conditions
from edgekit.errors import EdgekitError
from edgekit.runtime.bench.record import (
    ArtifactResult,
    Bandwidth,
    Memory,
    Record,
    Repetitions,
    Sample,
    Settings,
    percentile,
    rate,
    spread,
)
from edgekit.runtime.bench.replies import Loaded, Times
from edgekit.runtime.bench.run import (
    DEFAULT_SEED,
    distinct_names,
    probed,
    read_bandwidth,
    run,
)
from edgekit.runtime.bench.traffic import WeightSummary, holdings_of
from edgekit.runtime.bench.worker_process import WorkerProcess
from edgekit.runtime.decode_bytes import Shape, Traffic
from edgekit.runtime.engines.engine import Threads
from edgekit.runtime.model_files import ModelFile, find_model_file
from edgekit.version import __version__


@dataclass(frozen=True)
class ShapeResult(Repetitions):
    """All repetitions of a prefill or a decode on one artifact."""

    shape: Shape
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        """Refuse samples whose token count is not the test's."""
        wanted = self.shape.tokens if self.shape.kind == "tg" else 0
        for sample in self.samples:
            if len(sample.each_ns) != wanted:
                raise ValueError(
                    f"{self.shape.name}: {len(sample.each_ns)} timed tokens, not {wanted}"
                )

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [rate(self.shape.tokens, sample.elapsed_ns) for sample in self.samples]

    @property
    def name(self) -> str:
        """llama-bench's name of the test."""
        return self.shape.name

    def summary(self, traffic: Traffic | None, bandwidth: Bandwidth | None) -> dict[str, Any]:
        """Derive rates, latencies and the share of the bandwidth from the samples.

        Without traffic or bandwidth, what is derived from it is None.
        """
        derived: dict[str, Any] = {
            "tokens_per_second": spread(self.rates),
            "disturbed_repetitions": self.disturbed,
        }
        if self.shape.kind == "pp":
            firsts = [s.first_token_ns / 1e6 for s in self.samples if s.first_token_ns is not None]
            derived["ttft_ms"] = spread(firsts)
            return derived
        tokens = [ns / 1e6 for sample in self.samples for ns in sample.each_ns]
        touched = None if traffic is None else traffic.bytes_per_token(self.shape)
        reading = None if touched is None else touched * statistics.mean(self.rates) / 1e9
        derived["inter_token_ms"] = {"p50": percentile(tokens, 50), "p95": percentile(tokens, 95)}
        derived["bytes_per_token"] = touched
        derived["read_gb_per_s"] = reading
        derived["bandwidth_share"] = None
        if reading is not None and bandwidth is not None:
            derived["bandwidth_share"] = reading / bandwidth.limit
        return derived

    def to_dict(self, traffic: Traffic | None, bandwidth: Bandwidth | None) -> dict[str, Any]:
        """Return the raw samples and what follows from them."""
        return {
            "test": self.shape.name,
            "kind": self.shape.kind,
            "tokens": self.shape.tokens,
            "depth": self.shape.depth,
            "samples": [_sample_json(sample) for sample in self.samples],
            "summary": self.summary(traffic, bandwidth),
        }


def _sample_json(sample: Sample) -> dict[str, Any]:
    return {
        "order": sample.order,
        "elapsed_ns": sample.elapsed_ns,
        "token_ns": list(sample.each_ns),
        "first_token_ns": sample.first_token_ns,
        **sample.surroundings(),
    }


@dataclass(frozen=True, kw_only=True)
class DecoderResult(ArtifactResult):
    """A language model's identity, and its prefills and decodes.

    `schemes` and `traffic` are empty and None for a file that edgekit neither made nor can read.
    Where no process ran, `threads` is None, and `context` for a file that does not state it.
    """

    kind: ClassVar[str] = "edgekit-bench"

    model: Mapping[str, Any]
    schemes: Mapping[str, Mapping[str, int]]
    context: int | None
    threads: Threads | None = None
    traffic: Traffic | None
    tests: tuple[ShapeResult, ...]

    def to_dict(self, bandwidth: Bandwidth | None) -> dict[str, Any]:
        """Return everything known of the artifact as JSON data."""
        return {
            "name": self.name,
            "path": self.path,
            "target": self.target,
            "model": dict(self.model),
            "schemes": {name: dict(count) for name, count in self.schemes.items()},
            "file_bytes": self.file_bytes,
            "context": self.context,
            "threads": self.threads and asdict(self.threads),
            **self.process(),
            "traffic": self.traffic and self.traffic.to_dict(),
            "tests": [test.to_dict(self.traffic, bandwidth) for test in self.tests],
        }


def bench(
    artifacts: Sequence[Path],
    prompts: Sequence[int] = (512,),
    generates: Sequence[int] = (128,),
    depths: Sequence[int] = (0,),
    repetitions: int = 5,
    threads: int | None = None,
    cooldown_s: float = 0.0,
    seed: int = DEFAULT_SEED,
    host: Host = LOCAL,
    progress: Steps | None = None,
) -> Record[DecoderResult]:
    """Measure every artifact at every test and return the record of raw samples.

    An artifact is a folder that `edgekit export` wrote, or what `find_model_file` takes besides.
    A test is each of `prompts` (prefill) and `generates` (decode) at each of `depths`, in tokens;
    0 skips one. `threads` None leaves them to each engine, as `run` does: the physical cores this
    process may use, by its quota, or fewer where that decodes faster; `cooldown_s` is slept before
    every repetition. The artifacts lie here; they are brought to `host`, and all that is measured
    is measured there. Raises `EdgekitError` before anything is measured for a test that an
    artifact's context cannot hold, and when an artifact's process dies.
    """
    machine = probed(host, threads)
    asked = {"prompts": list(prompts), "generates": list(generates), "depths": list(depths)}
    used = default_threads(host) if threads is None else threads
    settings = Settings(asked, repetitions, used, cooldown_s, seed)
    shapes = plan(prompts, generates, depths)
    check_contexts(artifacts, shapes)
    workloads = _open(artifacts, shapes)
    show = progress or no_steps
    return run(workloads, machine, settings, threads, host, show, bandwidth=True)


def describe_each(
    artifacts: Sequence[Path], threads: int | None = None, host: Host = LOCAL
) -> Record[DecoderResult]:
    """Return the record of no test: what the files say, which no engine has to load for it."""
    machine, now = probed(host, threads), conditions(host).to_dict()
    used = default_threads(host) if threads is None else threads
    bandwidth = read_bandwidth(host, used)
    return Record(
        edgekit_version=__version__,
        timestamp_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine.to_dict(),
        settings=Settings({"prompts": [], "generates": [], "depths": []}, 0, used, 0.0, 0),
        conditions_before=now,
        conditions_after=now,
        bandwidth=Bandwidth(bandwidth, bandwidth),
        artifacts=tuple(workload.described() for workload in _open(artifacts, ())),
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
        raise EdgekitError(
            "`prompts` 0 and `generates` 0 leave nothing to measure: give one of them tokens"
        )
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
class _ShapeTest:
    """A prefill or a decode."""

    shape: Shape

    @property
    def name(self) -> str:
        return self.shape.name

    def warm_up(self, worker: WorkerProcess, seed: int) -> None:
        """llama-bench warms a prefill by the whole prompt and a decode by one token."""
        tokens = self.shape.tokens if self.shape.kind == "pp" else 1
        worker.time_decoder(replace(self.shape, depth=0, tokens=tokens), seed)

    def time(self, worker: WorkerProcess, seed: int) -> Times:
        return worker.time_decoder(self.shape, seed)


@dataclass(frozen=True)
class _Decoder:
    """A model file, under the name that tables and errors give it, and what to measure of it."""

    name: str
    file: ModelFile
    holdings: WeightSummary
    tests: tuple[_ShapeTest, ...]

    def load(self, worker: WorkerProcess, host: Host, threads: int | None) -> Loaded:
        """Load with room for the longest test, where the file's own number is less."""
        shapes = [test.shape for test in self.tests]
        context = self.file.room(max(shape.positions for shape in shapes))
        loaded = worker.load_decoder(self.file.engine, self.file.put(host), threads, context)
        _check_context(self.name, self.file, shapes, loaded.context or 0)
        return loaded

    def result(
        self, loaded: Loaded, peak: int | None, samples: Sequence[tuple[Sample, ...]]
    ) -> DecoderResult:
        """Return what is recorded."""
        tests = tuple(
            ShapeResult(test.shape, taken) for test, taken in zip(self.tests, samples, strict=True)
        )
        return DecoderResult(
            **self._file_facts(),
            **loaded.facts(peak),
            context=loaded.context,
            threads=loaded.threads,
            tests=tests,
        )

    def described(self) -> DecoderResult:
        """Return what is known where no process ran."""
        return DecoderResult(
            **self._file_facts(),
            context=self.file.longest,
            engine=self.file.engine,
            engine_version=None,
            affinity=(),
            import_ns=None,
            load_ns=None,
            memory=Memory(peak=None, before_load=None),
            tests=(),
        )

    def _file_facts(self) -> dict[str, Any]:
        """Return the fields that a file tells unopened."""
        return {
            "name": self.name,
            "path": str(self.file.place),
            "target": self.file.engine,
            "model": self.holdings.model,
            "schemes": self.holdings.schemes,
            "file_bytes": self.file.file_bytes,
            "traffic": self.holdings.traffic,
        }


def _open(paths: Sequence[Path], shapes: Sequence[Shape]) -> list[_Decoder]:
    if not paths:
        raise EdgekitError("bench needs at least one artifact folder")
    files = [find_model_file(path) for path in paths]
    tests = tuple(_ShapeTest(shape) for shape in shapes)
    return [
        _Decoder(name, file, holdings_of(file), tests)
        for name, file in zip(distinct_names(paths), files, strict=True)
    ]


def _check_context(name: str, file: ModelFile, shapes: Sequence[Shape], longest: int) -> None:
    for shape in shapes:
        if shape.positions > longest:
            field = "`prompts`" if shape.kind == "pp" else "`generates`"
            at = f" at `depths` {shape.depth}" if shape.depth else ""
            again = "" if file.manifest is None else ", or export with a larger `context`"
            raise EdgekitError(
                f"{name}: {field} {shape.tokens}{at} needs {shape.positions} positions "
                f"but the artifact's context is {longest}: ask for less{again}"
            )
