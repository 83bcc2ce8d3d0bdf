"""A benchmark record as Markdown: what was measured, on what, and what disturbed it."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.common.plural import counted
from edgekit.common.tables import fitting_table, in_lines
from edgekit.runtime.bench.decoder import DecoderResult, ShapeResult
from edgekit.runtime.bench.network import BurstResult, NetworkResult
from edgekit.runtime.bench.record import ArtifactResult, Bandwidth, Record, Sample
from edgekit.runtime.decode_bytes import Traffic

_NOTHING = "-"
_LOADING = ("engine", "load ms", "peak MB", "before load MB")


def render(record: Record[DecoderResult] | Record[NetworkResult]) -> str:
    """Return the record's tables, a line on the machine, and a line per disturbance."""
    parts = [_machine_line(record)]
    notes = disturbances(record)
    if decoders := [one for one in record.artifacts if isinstance(one, DecoderResult)]:
        parts += [_decoder_table(decoders), _speed_table(decoders, record.bandwidth)]
        notes += [*_thread_notes(decoders), *_cache_notes(decoders, record.machine)]
    if networks := [one for one in record.artifacts if isinstance(one, NetworkResult)]:
        parts += [_network_table(networks), _latency_table(networks)]
    if len(record.artifacts) > 1:
        parts.append(_ratio_table(record, one_test=bool(networks)))
    return "\n\n".join(part for part in [*parts, "\n".join(notes)] if part)


def _machine_line(record: Record[Any]) -> str:
    """Return the CPU, the threads and the order of the repetitions, and the read bandwidth."""
    machine, settings, bandwidth = record.machine, record.settings, record.bandwidth
    isa = ", ".join(machine["isa"] or ()) or "ISA features unreadable"
    order = ", interleaved" if len(record.artifacts) > 1 else ""
    quota = machine["cpu_quota"]
    granted = "" if quota is None else f" (a quota grants the time of {quota:.4g} CPUs)"
    threads = counted(settings.threads, "thread")
    line = in_lines(
        f"{machine['cpu'] or 'unknown CPU'} ({isa}); {threads}{granted}; "
        f"{counted(settings.repetitions, 'repetition')}{order}; "
        f"edgekit {record.edgekit_version}; {record.timestamp_utc}"
    )
    if bandwidth is None:
        return line
    return (
        f"{line}\nread bandwidth {bandwidth.before.gb_per_s:.1f} GB/s before, "
        f"{bandwidth.after.gb_per_s:.1f} after ({threads})"
    )


def _decoder_table(artifacts: Sequence[DecoderResult]) -> str:
    headers = ["artifact", "file MB", *_LOADING, "model", "schemes"]
    rows = [
        [
            one.name,
            megabytes(one.file_bytes),
            *_loading(one),
            str(one.model["id"] or _NOTHING),
            _schemes(one),
        ]
        for one in artifacts
    ]
    return fitting_table(headers, rows, align="lrlrrrll")


def _network_table(artifacts: Sequence[NetworkResult]) -> str:
    headers = ["artifact", "file kB", *_LOADING, "model", "recipe"]
    rows = [
        [one.name, f"{one.file_bytes / 1e3:,.1f}", *_loading(one), one.model, one.recipe]
        for one in artifacts
    ]
    return fitting_table(headers, rows, align="lrlrrrll")


def _loading(item: ArtifactResult) -> list[str]:
    """Return an artifact's engine, how long it loaded, and its memory at most and before."""
    return [
        f"{item.engine} {item.engine_version}",
        _NOTHING if item.load_ns is None else f"{item.load_ns / 1e6:.1f}",
        megabytes(item.memory.peak),
        megabytes(item.memory.before_load),
    ]


def _schemes(artifact: DecoderResult) -> str:
    counts = artifact.schemes.items()
    return ", ".join(f"{count['tensors']} {name}" for name, count in counts) or _NOTHING


def _speed_table(artifacts: Sequence[DecoderResult], bandwidth: Bandwidth | None) -> str:
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
        _speed_row(artifact, test, bandwidth) for artifact in artifacts for test in artifact.tests
    ]
    return fitting_table(headers, rows, align="llrrrrrrr", keys=2)


def _speed_row(
    artifact: DecoderResult, test: ShapeResult, bandwidth: Bandwidth | None
) -> list[str]:
    summary = test.summary(artifact.traffic, bandwidth)
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


def _latency_table(artifacts: Sequence[NetworkResult]) -> str:
    headers = ["artifact", "batch", "ms a run", "median", "p95", "least", "inputs/s"]
    rows = [_latency_row(one, bursts) for one in artifacts for bursts in one.tests]
    return fitting_table(headers, rows, align="lrrrrrr")


def _latency_row(item: NetworkResult, bursts: BurstResult) -> list[str]:
    found = bursts.summary()
    medians, runs = found["repetition_median_ms"], found["ms"]
    spread = "" if medians["stdev"] is None else f" ± {medians['stdev']:.3f}"
    mark = " !" if bursts.disturbed else ""
    return [
        item.name,
        str(item.batch),
        f"{medians['mean']:.3f}{spread}{mark}",
        *(f"{runs[key]:.3f}" for key in ("median", "p95", "min")),
        f"{found['inputs_per_second']:,.0f}",
    ]


def _ratio_table(record: Record[Any], *, one_test: bool) -> str:
    """Return the ratios; where all artifacts have the same one test it is not named."""
    tests = [] if one_test else ["test"]
    rows = [
        [
            ratio["artifact"],
            *(ratio[test] for test in tests),
            f"{ratio['median']:.2f}x",
            f"{ratio['min']:.2f}-{ratio['max']:.2f}",
        ]
        for ratio in record.ratios()
    ]
    against = f"speed against {record.artifacts[0].name}"
    headers = ["artifact", *tests, against, "min-max of pairs"]
    return fitting_table(headers, rows, align="l" * (1 + len(tests)) + "rr")


def disturbances(record: Record[Any]) -> list[str]:
    """Say what disturbed the run: load beside it, which `!` marks, and gates that did not pass."""
    return [*_load_notes(record.samples), *_gate_notes(record.samples)]


def _load_notes(samples: Sequence[Sample]) -> list[str]:
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


def _gate_notes(samples: Sequence[Sample]) -> list[str]:
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


def _thread_notes(artifacts: Sequence[DecoderResult]) -> list[str]:
    """Say where an engine decodes with fewer threads than it takes a prompt with."""
    return [
        f"{artifact.name}: {counted(artifact.threads.decode, 'thread')} for decoding"
        + ("" if (traffic := artifact.traffic) is None else _token_note(traffic))
        for artifact in artifacts
        if artifact.threads is not None and artifact.threads.decode < artifact.threads.prompt
    ]


def _token_note(traffic: Traffic) -> str:
    return f": a token's weights are {megabytes(traffic.weight_bytes)} MB"


def _cache_notes(artifacts: Sequence[DecoderResult], machine: Mapping[str, Any]) -> list[str]:
    """Memory bandwidth bounds only what memory must deliver."""
    caches = machine["caches"]
    last = max((cache["level"] for cache in caches), default=0)
    size = sum(cache["bytes"] * cache["instances"] for cache in caches if cache["level"] == last)
    return [
        f"{artifact.name}: the weights of a token ({megabytes(artifact.traffic.weight_bytes)} MB)"
        + f" fit the last-level cache ({megabytes(size)} MB): bandwidth is no limit to it"
        for artifact in artifacts
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
