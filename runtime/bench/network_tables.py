"""A benchmark record of modules as Markdown."""

from edgekit.common.tables import fitting_table
from edgekit.runtime.bench.network import ModuleRecord, ModuleResult
from edgekit.runtime.bench.tables import gate_notes, load_note, loading_cells, machine_line


def render(record: ModuleRecord) -> str:
    """Return a line on the machine, the record's tables, and a line per disturbance."""
    several = len(record.artifacts) > 1
    parts = [
        machine_line(
            record.machine,
            record.settings.threads,
            record.settings.repetitions,
            several,
            f"edgekit {record.edgekit_version}; {record.timestamp_utc}",
        ),
        _artifact_table(record),
        _latency_table(record),
        *([_ratio_table(record)] if several else []),
    ]
    samples = [sample for artifact in record.artifacts for sample in artifact.samples]
    notes = [*load_note(samples), *gate_notes(samples)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _artifact_table(record: ModuleRecord) -> str:
    headers = [
        *("artifact", "file kB", "engine", "load ms", "peak MB", "before load MB"),
        *("model", "recipe"),
    ]
    rows = [
        [
            item.name,
            f"{item.file_bytes / 1e3:,.1f}",
            *loading_cells(item),
            item.model,
            item.recipe,
        ]
        for item in record.artifacts
    ]
    return fitting_table(headers, rows, align="lrlrrrll")


def _latency_table(record: ModuleRecord) -> str:
    headers = ["artifact", "batch", "ms a run", "median", "p95", "least", "inputs/s"]
    return fitting_table(headers, [_row(item) for item in record.artifacts], align="lrrrrrr")


def _row(item: ModuleResult) -> list[str]:
    found = item.summary()
    medians, runs = found["repetition_median_ms"], found["ms"]
    spread = "" if medians["stdev"] is None else f" ± {medians['stdev']:.3f}"
    mark = " !" if item.disturbed else ""
    return [
        item.name,
        str(item.batch),
        f"{medians['mean']:.3f}{spread}{mark}",
        *(f"{runs[key]:.3f}" for key in ("median", "p95", "min")),
        f"{found['inputs_per_second']:,.0f}",
    ]


def _ratio_table(record: ModuleRecord) -> str:
    first = record.artifacts[0].name
    rows = [
        [
            ratio["artifact"],
            f"{ratio['median']:.2f}x",
            f"{ratio['min']:.2f}-{ratio['max']:.2f}",
        ]
        for ratio in record.ratios()
    ]
    headers = ["artifact", f"speed against {first}", "min-max of pairs"]
    return fitting_table(headers, rows, align="lrr")
