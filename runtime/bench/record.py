"""The benchmark record: raw samples in nanoseconds, and the functions that derive rates from them.

A record stores what was measured; every rate, percentile, share and ratio in its JSON is computed
from those samples by the functions of this file when the JSON is written.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.common.files import new_file
from edgekit.devices.probe.bandwidth import ReadBandwidth
from edgekit.runtime.decode_bytes import Shape, Traffic
from edgekit.runtime.engines.engine import Threads

SCHEMA_VERSION = 1

# Above this share, work that is not the measurement is called interference, and a quota a limit.
_VISIBLE_SHARE = 0.05


@dataclass(frozen=True)
class Interference:
    """What else the CPUs did during one repetition, as shares.

    `own`: CPU time of the engine's process over wall time x threads. A low value alone may be an
    engine that leaves its threads idle. `other`: busy and stolen time of all CPUs that was not
    the engine's, over wall time x CPUs. `waited`: time in which the engine's threads were ready
    but did not run, over wall time x threads: another process had the CPU, or a quota held them
    back. `throttled`: time in which the quota of a control group held CPUs back, over wall time x
    threads. None where the system does not say, and `throttled` where there is no quota.
    """

    own: float
    other: float | None
    waited: float | None
    throttled: float | None = None

    @property
    def waited_for_others(self) -> float:
        """The share of waiting that the quota does not explain."""
        return max(0.0, (self.waited or 0.0) - (self.throttled or 0.0))

    @property
    def visible(self) -> bool:
        """True when another load took more than 5 % of the CPUs or of the engine's turn."""
        return max(self.other or 0.0, self.waited_for_others) > _VISIBLE_SHARE

    @property
    def limited(self) -> bool:
        """True when the quota took more than 5 % of the engine's time."""
        return (self.throttled or 0.0) > _VISIBLE_SHARE

    def to_dict(self) -> dict[str, Any]:
        """Return the shares and the verdict."""
        return {
            "own_cpu_share": self.own,
            "other_cpu_share": self.other,
            "waited_share": self.waited,
            "throttled_share": self.throttled,
            "visible": self.visible,
            "limited_by_quota": self.limited,
        }


@dataclass(frozen=True)
class Gate:
    """One readiness check before a repetition; `passed` is None where it cannot be read."""

    name: str
    value: float | None
    limit: str
    passed: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Return the gate as JSON data."""
        return {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "passed": self.passed,
        }


class Surrounded:
    """What the records of one repetition share, of a language model and of a module."""

    interference: Interference
    gates: tuple[Gate, ...]
    conditions: Mapping[str, Any]

    def surroundings(self) -> dict[str, Any]:
        """Return what else went on in the machine, as JSON data."""
        return {
            "interference": self.interference.to_dict(),
            "gates": [gate.to_dict() for gate in self.gates],
            "conditions_before": dict(self.conditions),
        }


@dataclass(frozen=True)
class Sample(Surrounded):
    """One timed repetition.

    `order` is its place among all repetitions of the call. `token_ns` holds one duration per
    decoded token (empty for a prefill); they sum to `elapsed_ns`. `first_token_ns` runs from the
    prompt's first token id to the first chosen output token (prefill only).
    """

    order: int
    elapsed_ns: int
    token_ns: tuple[int, ...]
    first_token_ns: int | None
    interference: Interference
    gates: tuple[Gate, ...]
    conditions: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse durations that no clock gives."""
        if self.elapsed_ns <= 0:
            raise ValueError(f"elapsed_ns must be positive: {self.elapsed_ns}")
        if self.token_ns and sum(self.token_ns) != self.elapsed_ns:
            raise ValueError(f"token_ns sum to {sum(self.token_ns)}, not {self.elapsed_ns}")

    def to_dict(self) -> dict[str, Any]:
        """Return the sample as JSON data."""
        return {
            "order": self.order,
            "elapsed_ns": self.elapsed_ns,
            "token_ns": list(self.token_ns),
            "first_token_ns": self.first_token_ns,
            **self.surroundings(),
        }


@dataclass(frozen=True)
class Bandwidth:
    """Read bandwidth of this machine, measured before and after the tests."""

    before: ReadBandwidth
    after: ReadBandwidth

    @property
    def limit(self) -> float:
        """The better of the two in GB/s (1e9): other load can only lower a measured bandwidth."""
        return max(self.before.gb_per_s, self.after.gb_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Return both measurements and the limit as JSON data."""
        return {
            "limit_gb_per_s": self.limit,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }


@dataclass(frozen=True)
class Memory:
    """Memory of one artifact's own process in bytes.

    `peak` is `max(VmHWM, sampled VmRSS + VmSwap)`: resident memory alone hides what was pushed
    to compressed swap. `before_load` is the same figure when the interpreter and the engine's
    libraries were in, but not the model. None where the system does not say.
    """

    peak: int | None
    before_load: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {"peak_bytes": self.peak, "before_load_bytes": self.before_load}


@dataclass(frozen=True)
class ShapeResult:
    """All repetitions of one test on one artifact."""

    shape: Shape
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        """Refuse samples whose token count is not the test's."""
        wanted = self.shape.tokens if self.shape.kind == "tg" else 0
        for sample in self.samples:
            if len(sample.token_ns) != wanted:
                raise ValueError(
                    f"{self.shape.name}: {len(sample.token_ns)} timed tokens, not {wanted}"
                )

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [rate(self.shape.tokens, sample.elapsed_ns) for sample in self.samples]

    @property
    def disturbed(self) -> int:
        """How many repetitions ran beside a visible other load."""
        return sum(sample.interference.visible for sample in self.samples)

    def summary(self, traffic: Traffic | None, bandwidth: Bandwidth) -> dict[str, Any]:
        """Derive rates, latencies and the share of the bandwidth from the samples.

        Without traffic, what is derived from it is None.
        """
        derived: dict[str, Any] = {
            "tokens_per_second": spread(self.rates),
            "disturbed_repetitions": self.disturbed,
        }
        if self.shape.kind == "pp":
            firsts = [s.first_token_ns / 1e6 for s in self.samples if s.first_token_ns is not None]
            derived["ttft_ms"] = spread(firsts)
            return derived
        tokens = [ns / 1e6 for sample in self.samples for ns in sample.token_ns]
        touched = None if traffic is None else traffic.bytes_per_token(self.shape)
        reading = None if touched is None else touched * statistics.mean(self.rates) / 1e9
        derived["inter_token_ms"] = {"p50": percentile(tokens, 50), "p95": percentile(tokens, 95)}
        derived["bytes_per_token"] = touched
        derived["read_gb_per_s"] = reading
        derived["bandwidth_share"] = None if reading is None else reading / bandwidth.limit
        return derived

    def to_dict(self, traffic: Traffic | None, bandwidth: Bandwidth) -> dict[str, Any]:
        """Return the raw samples and what follows from them."""
        return {
            "test": self.shape.name,
            "kind": self.shape.kind,
            "tokens": self.shape.tokens,
            "depth": self.shape.depth,
            "samples": [sample.to_dict() for sample in self.samples],
            "summary": self.summary(traffic, bandwidth),
        }


class InProcess:
    """What the results of an artifact share: the process in which its engine ran.

    `engine_built`: the instructions that the engine was compiled for, where it says so.
    """

    engine: str
    engine_version: str | None
    engine_built: str | None
    affinity: tuple[int, ...]
    import_ns: int | None
    load_ns: int | None
    memory: Memory

    def process(self) -> dict[str, Any]:
        """Return the engine and what loading took, as JSON data."""
        return {
            "engine": {
                "name": self.engine,
                "version": self.engine_version,
                "built": self.engine_built,
            },
            "affinity": list(self.affinity),
            "import_ns": self.import_ns,
            "load_ns": self.load_ns,
            "memory": self.memory.to_dict(),
        }


def process_facts(load: Mapping[str, Any], peak: int | None) -> dict[str, Any]:
    """Return the fields of `InProcess` from a worker's reply to its loading."""
    return {
        "engine": load["engine"],
        "engine_version": load["version"],
        "engine_built": load.get("built"),
        "affinity": tuple(load["affinity"]),
        "import_ns": load["import_ns"],
        "load_ns": load["load_ns"],
        "memory": Memory(peak=peak, before_load=load["before_load_bytes"]),
    }


@dataclass(frozen=True)
class ArtifactResult(InProcess):
    """One artifact's identity, its process and its tests.

    `schemes` and `traffic` are empty and None for a file that edgekit neither made nor can read.
    What only a process knows is None where none ran: the engine's version and threads, what loading
    took, the context of a file that does not state it.
    """

    name: str
    path: str
    target: str
    model: Mapping[str, Any]
    schemes: Mapping[str, Mapping[str, int]]
    file_bytes: int
    context: int | None
    engine: str
    engine_version: str | None
    affinity: tuple[int, ...]
    import_ns: int | None
    load_ns: int | None
    memory: Memory
    traffic: Traffic | None
    tests: tuple[ShapeResult, ...]
    threads: Threads | None = None
    engine_built: str | None = None

    def to_dict(self, bandwidth: Bandwidth) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Settings:
    """What was asked of the benchmark, and nothing that was measured."""

    prompts: tuple[int, ...]
    generates: tuple[int, ...]
    depths: tuple[int, ...]
    repetitions: int
    threads: int
    cooldown_s: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return {
            "prompts": list(self.prompts),
            "generates": list(self.generates),
            "depths": list(self.depths),
            "repetitions": self.repetitions,
            "threads": self.threads,
            "cooldown_s": self.cooldown_s,
            "seed": self.seed,
        }


class Saved:
    """A record of a benchmark as JSON text."""

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as JSON data."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the JSON text whole or not at all; raises `EdgekitError` where that fails."""
        with new_file(path) as scratch:
            scratch.write_text(self.to_json() + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Record(Saved):
    """One call of the benchmark: a machine, its conditions, and one result per artifact."""

    edgekit_version: str
    timestamp_utc: str
    machine: Mapping[str, Any]
    settings: Settings
    conditions_before: Mapping[str, Any]
    conditions_after: Mapping[str, Any]
    bandwidth: Bandwidth
    artifacts: tuple[ArtifactResult, ...]

    def sequence(self) -> list[tuple[str, str]]:
        """Return (artifact, test) of every timed repetition in the order in which they ran."""
        ran = [
            (sample.order, artifact.name, test.shape.name)
            for artifact in self.artifacts
            for test in artifact.tests
            for sample in test.samples
        ]
        return [(name, test) for _, name, test in sorted(ran)]

    def ratios(self) -> list[dict[str, Any]]:
        """Return the speed of every further artifact over the first one's, per test."""
        first, *others = self.artifacts
        return [
            {
                "artifact": other.name,
                "against": first.name,
                "test": test.shape.name,
                **paired_ratio(test.rates, base.rates),
            }
            for other in others
            for test, base in zip(other.tests, first.tests, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as JSON data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "edgekit-bench",
            "edgekit_version": self.edgekit_version,
            "timestamp_utc": self.timestamp_utc,
            "machine": dict(self.machine),
            "settings": self.settings.to_dict(),
            "conditions_before": dict(self.conditions_before),
            "conditions_after": dict(self.conditions_after),
            "bandwidth": self.bandwidth.to_dict(),
            "artifacts": [artifact.to_dict(self.bandwidth) for artifact in self.artifacts],
            "sequence": [list(step) for step in self.sequence()],
            "ratios": self.ratios(),
        }


def rate(tokens: int, elapsed_ns: int) -> float:
    """Return tokens per second."""
    return tokens * 1e9 / elapsed_ns


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation (None for a single value) and median."""
    return {
        "mean": statistics.mean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by linear interpolation between order statistics (type 7)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def paired_ratio(rates: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest of the ratios of repetitions that ran side by side."""
    ratios = [ours / theirs for ours, theirs in zip(rates, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
