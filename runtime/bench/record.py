"""The benchmark record: raw samples in nanoseconds, and the functions that derive rates from them.

Its form is one for all that is measured; `decoder.py` and `network.py` say what their tests and
artifacts have besides. A record stores what was measured; every rate, percentile, share and ratio
in its JSON is computed from the samples when the JSON is written.
"""

import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from edgekit.common.files import new_file
from edgekit.devices.probe.bandwidth import ReadBandwidth

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


@dataclass(frozen=True)
class Sample:
    """One timed repetition.

    `order` is its place among all repetitions of the call. `each_ns` holds one duration per decoded
    token, or per run of a network (none for a prefill); they sum to `elapsed_ns`. `first_token_ns`
    runs from the prompt's first token id to the first chosen output token (prefill only).
    """

    order: int
    elapsed_ns: int
    each_ns: tuple[int, ...]
    first_token_ns: int | None
    interference: Interference
    gates: tuple[Gate, ...]
    conditions: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse durations that no clock gives."""
        if self.elapsed_ns <= 0:
            raise ValueError(f"elapsed_ns must be positive: {self.elapsed_ns}")
        if self.each_ns and sum(self.each_ns) != self.elapsed_ns:
            raise ValueError(f"each_ns sum to {sum(self.each_ns)}, not {self.elapsed_ns}")

    def surroundings(self) -> dict[str, Any]:
        """Return what else went on in the machine, as JSON data."""
        return {
            "interference": self.interference.to_dict(),
            "gates": [gate.to_dict() for gate in self.gates],
            "conditions_before": dict(self.conditions),
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

    `peak` is `max(VmHWM, VmRSS + VmSwap)`, read after each repetition: resident memory alone hides
    what was pushed to compressed swap. `before_load` is the same figure when the interpreter and
    the engine's libraries were in, but not the model. None where the system does not say.
    """

    peak: int | None
    before_load: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {"peak_bytes": self.peak, "before_load_bytes": self.before_load}


class Repetitions(ABC):
    """All repetitions of one test on one artifact."""

    samples: tuple[Sample, ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the test, the same for all artifacts."""

    @property
    @abstractmethod
    def rates(self) -> list[float]:
        """Tokens or inputs per second of each repetition."""

    @property
    def disturbed(self) -> int:
        """How many repetitions ran beside a visible other load."""
        return sum(sample.interference.visible for sample in self.samples)


@dataclass(frozen=True, kw_only=True)
class ArtifactResult(ABC):
    """One artifact, the process in which its engine ran, and its tests.

    `kind` is that of the whole record. `engine_built`: the instructions that the engine was
    compiled for, where it says so. What only a process knows is None where none ran: the engine's
    version and what loading took.
    """

    kind: ClassVar[str]

    name: str
    path: str
    target: str
    file_bytes: int
    engine: str
    engine_version: str | None
    engine_built: str | None = None
    affinity: tuple[int, ...]
    import_ns: int | None
    load_ns: int | None
    memory: Memory
    tests: tuple[Repetitions, ...]

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

    @abstractmethod
    def to_dict(self, bandwidth: Bandwidth | None) -> dict[str, Any]:
        """Return everything known of the artifact as JSON data."""


@dataclass(frozen=True)
class Settings:
    """What was asked of the benchmark, and nothing that was measured.

    `tests` are the numbers that describe its tests, by the names of the options.
    """

    tests: Mapping[str, Any]
    repetitions: int
    threads: int
    cooldown_s: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return {
            **self.tests,
            "repetitions": self.repetitions,
            "threads": self.threads,
            "cooldown_s": self.cooldown_s,
            "seed": self.seed,
        }


Result = TypeVar("Result", bound=ArtifactResult)


@dataclass(frozen=True)
class Record(Generic[Result]):
    """One call of the benchmark: a machine, its conditions, and one result per artifact.

    `bandwidth` is None where it bounds nothing.
    """

    edgekit_version: str
    timestamp_utc: str
    machine: Mapping[str, Any]
    settings: Settings
    conditions_before: Mapping[str, Any]
    conditions_after: Mapping[str, Any]
    bandwidth: Bandwidth | None
    artifacts: tuple[Result, ...]

    @property
    def samples(self) -> list[Sample]:
        """All repetitions, artifact by artifact."""
        tests = [test for artifact in self.artifacts for test in artifact.tests]
        return [sample for test in tests for sample in test.samples]

    def sequence(self) -> list[tuple[str, str]]:
        """Return (artifact, test) of every timed repetition in the order in which they ran."""
        ran = [
            (sample.order, artifact.name, test.name)
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
                "test": test.name,
                **paired_ratio(test.rates, base.rates),
            }
            for other in others
            for test, base in zip(other.tests, first.tests, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as JSON data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.artifacts[0].kind,
            "edgekit_version": self.edgekit_version,
            "timestamp_utc": self.timestamp_utc,
            "machine": dict(self.machine),
            "settings": self.settings.to_dict(),
            "conditions_before": dict(self.conditions_before),
            "conditions_after": dict(self.conditions_after),
            "bandwidth": self.bandwidth and self.bandwidth.to_dict(),
            "artifacts": [artifact.to_dict(self.bandwidth) for artifact in self.artifacts],
            "sequence": [list(step) for step in self.sequence()],
            "ratios": self.ratios(),
        }

    def to_json(self) -> str:
        """Return the record as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the JSON text whole or not at all; raises `EdgekitError` where that fails."""
        with new_file(path) as scratch:
            scratch.write_text(self.to_json() + "\n", encoding="utf-8")


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
