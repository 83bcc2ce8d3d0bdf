"""A benchmark record as Markdown: what was measured, on what, and what disturbed it."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.common.plural import counted
from edgekit.common.tables import fitting_table, in_lines
from edgekit.runtime.bench.record import (
    ArtifactResult,
    InProcess,
    Record,
    ShapeResult,
    Surrounded,
)
from edgekit.runtime.decode_bytes import Traffic

_NOTHING = "-"


def render(record: Record) -> str:
    """Return the record's tables, a line on the machine, and a line per disturbance."""
    parts = [_machine_line(record), _artifact_table(record), _speed_table(record)]
    if len(record.artifacts) > 1:
        parts.append(_ratio_table(record))
    parts += ["\n".join([*disturbances(record), *_thread_notes(record), *_cache_notes(record)])]
    return "\n\n".join(part for part in parts if part)


def _machine_line(record: Record) -> str:
    settings, bandwidth = record.settings, record.bandwidth
    line = machine_line(
        record.machine,
        settings.threads,
        settings.repetitions,
        len(record.artifacts) > 1,
        f"edgekit {record.edgekit_version}; {record.timestamp_utc}",
    )
    return (
        f"{in_lines(line)}\nread bandwidth {bandwidth.before.gb_per_s:.1f} GB/s before, "
        f"{bandwidth.after.gb_per_s:.1f} after ({counted(settings.threads, 'thread')})"
    )


def machine_line(
    machine: Mapping[str, Any], threads: int, repetitions: int, interleaved: bool, made: str
) -> str:
    """Return the CPU, the threads and the order of the repetitions in one line."""
    isa = ", ".join(machine["isa"] or ()) or "ISA features unreadable"
    order = ", interleaved" if interleaved else ""
    quota = machine["cpu_quota"]
    granted = "" if quota is None else f" (a quota grants the time of {quota:.4g} CPUs)"
    return (
        f"{machine['cpu'] or 'unknown CPU'} ({isa}); {counted(threads, 'thread')}{granted}; "
        f"{counted(repetitions, 'repetition')}{order}; {made}"
    )


def _artifact_table(record: Record) -> str:
    headers = [
        "artifact",
        "file MB",
        "engine",
        "load ms",
        "peak MB",
        "before load MB",
        "model",
        "schemes",
    ]
    rows = [
        [
            artifact.name,
            megabytes(artifact.file_bytes),
            *loading_cells(artifact),
            str(artifact.model["id"] or _NOTHING),
            _schemes(artifact),
        ]
        for artifact in record.artifacts
    ]
    return fitting_table(headers, rows, align="lrlrrrll")


def loading_cells(item: InProcess) -> list[str]:
    """Return an artifact's engine, how long it loaded, and its memory at most and before."""
    return [
        f"{item.engine} {item.engine_version}",
        _NOTHING if item.load_ns is None else f"{item.load_ns / 1e6:.1f}",
        megabytes(item.memory.peak),
        megabytes(item.memory.before_load),
    ]


def _schemes(artifact: ArtifactResult) -> str:
    counts = artifact.schemes.items()
    return ", ".join(f"{count['tensors']} {name}" for name, count in counts) or _NOTHING


def _speed_table(record: Record) -> str:
    headers = [
        "artifact",
        "test",
        "tok/s",
        "median",
        "TTFT ms",
        "p50 ms",
        "p95 ms",
        "GB/s",
        "of bandwidth",
    ]
    rows = [
        _speed_row(record, artifact, test)
        for artifact in record.artifacts
        for test in artifact.tests
    ]
    return fitting_table(headers, rows, align="llrrrrrrr", keys=2)


def _speed_row(record: Record, artifact: ArtifactResult, test: ShapeResult) -> list[str]:
    summary = test.summary(artifact.traffic, record.bandwidth)
    speed = summary["tokens_per_second"]
    mark = " !" if test.disturbed else ""
    cells = [artifact.name, test.shape.name, _mean_and_spread(speed) + mark]
    cells.append(f"{speed['median']:.{_decimals(speed['median'])}f}")
    if test.shape.kind == "pp":
        return [*cells, f"{summary['ttft_ms']['mean']:.1f}", *[_NOTHING] * 4]
    latency = summary["inter_token_ms"]
    return [
        *cells,
        _NOTHING,
        f"{latency['p50']:.2f}",
        f"{latency['p95']:.2f}",
        _NOTHING if summary["read_gb_per_s"] is None else f"{summary['read_gb_per_s']:.1f}",
        _NOTHING if summary["bandwidth_share"] is None else f"{summary['bandwidth_share']:.0%}",
    ]


def _ratio_table(record: Record) -> str:
    first = record.artifacts[0].name
    rows = [
        [
            ratio["artifact"],
            ratio["test"],
            f"{ratio['median']:.2f}x",
            f"{ratio['min']:.2f}-{ratio['max']:.2f}",
        ]
        for ratio in record.ratios()
    ]
    return fitting_table(
        ["artifact", "test", f"speed against {first}", "min-max of pairs"], rows, align="llrr"
    )


def disturbances(record: Record) -> list[str]:
    """Say what disturbed the run: load beside it, which `!` marks, and gates that did not pass."""
    samples = [
        sample
        for artifact in record.artifacts
        for test in artifact.tests
        for sample in test.samples
    ]
    return [*load_note(samples), *gate_notes(samples)]


def load_note(samples: Sequence[Surrounded]) -> list[str]:
    """Say how much of the CPUs another load took, and a quota of the threads' time, if visible."""
    all_of_them = counted(len(samples), "repetition")
    seen = [sample.interference for sample in samples if sample.interference.visible]
    held = [sample.interference for sample in samples if sample.interference.limited]
    notes = []
    if seen:
        other = max(one.other or 0.0 for one in seen)
        waited = max(one.waited_for_others for one in seen)
        notes.append(
            f"! other load was visible in {len(seen)} of {all_of_them}: up to "
            f"{other:.0%} of the CPUs, and threads waited up to {waited:.0%} of their time"
        )
    if held:
        most = max(one.throttled or 0.0 for one in held)
        notes.append(
            f"the CPU quota of this control group held the threads back in {len(held)} of "
            f"{all_of_them}: up to {most:.0%} of their time"
        )
    return notes


def gate_notes(samples: Sequence[Surrounded]) -> list[str]:
    """Say which readiness checks did not pass, and how often."""
    failed: dict[tuple[str, str], list[float]] = {}
    for sample in samples:
        for gate in sample.gates:
            if gate.passed is False:
                failed.setdefault((gate.name, gate.limit), []).append(gate.value or 0.0)
    return [
        f"{name} was not {limit} before {len(values)} of {counted(len(samples), 'repetition')} "
        + f"(up to {max(values):,.0f})"
        for (name, limit), values in failed.items()
    ]


def _thread_notes(record: Record) -> list[str]:
    """Say where an engine decodes with fewer threads than it takes a prompt with."""
    return [
        f"{artifact.name}: {counted(artifact.threads.decode, 'thread')} for decoding"
        + ("" if (traffic := artifact.traffic) is None else _token_note(traffic))
        for artifact in record.artifacts
        if artifact.threads is not None and artifact.threads.decode < artifact.threads.prompt
    ]


def _token_note(traffic: Traffic) -> str:
    return f": a token's weights are {megabytes(traffic.weight_bytes)} MB"


def _cache_notes(record: Record) -> list[str]:
    """Memory bandwidth bounds only what memory must deliver."""
    caches = record.machine["caches"]
    last = max((cache["level"] for cache in caches), default=0)
    size = sum(cache["bytes"] * cache["instances"] for cache in caches if cache["level"] == last)
    return [
        f"{artifact.name}: the weights of a token ({megabytes(artifact.traffic.weight_bytes)} MB)"
        + f" fit the last-level cache ({megabytes(size)} MB): bandwidth is no limit to it"
        for artifact in record.artifacts
        if artifact.traffic is not None and artifact.traffic.weight_bytes <= size
    ]


def _mean_and_spread(speed: Mapping[str, float]) -> str:
    """Two decimals as llama-bench prints, none where they would be noise."""
    mean, stdev = speed["mean"], speed["stdev"]
    decimals = _decimals(mean)
    return f"{mean:.{decimals}f}" + ("" if stdev is None else f" ± {stdev:.{decimals}f}")


def _decimals(rate: float) -> int:
    return 0 if rate >= 1000 else 2


def megabytes(size: int | None) -> str:
    """Return a size in MB, or a dash."""
    return _NOTHING if size is None else f"{size / 1e6:.1f}"
