"""A comparison as one HTML page that needs nothing else: table, plots, weights."""

from collections.abc import Iterator, Sequence
from html import escape

from edgekit.common.plots import Axis, Point, bars, lines, marker, scatter
from edgekit.common.plural import counted
from edgekit.exporters.readback import TensorComparison, known_ratio_db
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.runtime.bench.record import spread
from edgekit.workflows.compare import Compared, Comparison

# Okabe and Ito's colours, which the colour-blind tell apart, a little deeper in light and lighter
# in dark, so that each stands out from the ground by a contrast of 3 to 1 or more.
_LIGHT = ("#0062a3", "#c14f00", "#00805c", "#a04a83", "#8a6d00", "#555555")
_DARK = ("#5cb3ec", "#f0894a", "#2fc79c", "#dd95c2", "#e0c53d", "#b0b0b0")

LEAST_KLD = 1e-6
"""Nats; what is less is rounding, and would stretch a logarithmic axis over empty decades."""

_STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --ink: #1c1c1a;
  --soft: #5d5d58; --rule: #e3e2dd; %(light)s }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --card: #1f1f1d; --ink: #ecebe6;
  --soft: #a3a29b; --rule: #373632; %(dark)s } }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 2px; } h2 { font-size: 16px; margin: 34px 0 10px; }
p { margin: 4px 0; } .soft { color: var(--soft); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 16px 0 10px; padding: 0; }
.legend li { list-style: none; display: flex; align-items: center; gap: 7px; }
.legend svg { width: 16px; height: 16px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%%; font-size: 14px; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; }
td.text + td.text, td:last-child { white-space: normal; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }
@media (max-width: 520px) { .plots { grid-template-columns: 1fr; } }
figure { margin: 0; padding: 12px 14px 6px; background: var(--card); min-width: 0;
  border: 1px solid var(--rule); border-radius: 8px; }
figcaption { font-weight: 600; } figcaption .soft { display: block; font-weight: 400; }
figure svg { width: 100%%; height: auto; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.tick, svg text.axis { fill: var(--soft); } svg text.in { fill: var(--card); }
.grid { stroke: var(--rule); stroke-width: 1; } .edge { stroke: var(--soft); stroke-width: 1; }
.mark, .bar { fill: var(--c); } .mark { stroke: var(--card); stroke-width: 1; }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; }
.whisker { stroke: var(--ink); stroke-width: 1.2; }
summary { cursor: pointer; color: var(--soft); } details .wide { margin-top: 10px; }
td.differs { font-weight: 600; }
%(series)s
"""


def page(comparison: Comparison) -> str:
    """Return the page; whatever stands in names is text in it."""
    names = ", ".join(one.name for one in comparison.artifacts)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(names)}</title><style>{_style()}</style></head><body>",
        f"<h1>{escape(names)}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in _introduction(comparison)),
        _legend(comparison),
        _summary(comparison),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_figures(comparison))}</div>',
        *_weights(comparison),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _style() -> str:
    numbered = range(len(_LIGHT))
    return _STYLE % {
        "light": " ".join(f"--c{i}: {_LIGHT[i]};" for i in numbered),
        "dark": " ".join(f"--c{i}: {_DARK[i]};" for i in numbered),
        "series": "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in numbered),
    }


def _series(index: int) -> int:
    """Return the colour and marker of an artifact; they come again after the last."""
    return index % len(_LIGHT)


def _introduction(comparison: Comparison) -> Iterator[str]:
    record = comparison.record
    threads = record.settings.threads
    repeated = record.settings.repetitions
    timed = f"{counted(repeated, 'repetition')}, interleaved" if repeated else "speed not measured"
    bandwidth = record.bandwidth
    speed = "" if bandwidth is None else f"read bandwidth {bandwidth.limit:.1f} GB/s; "
    yield (
        f"{record.machine['cpu'] or 'unknown CPU'}, {counted(threads, 'thread')}, {timed}; "
        f"{speed}edgekit {record.edgekit_version}, {record.timestamp_utc}"
    )
    yield from comparison.notes
    found = comparison.artifacts[0].evaluation
    if found is not None:
        against = "" if found.reference is None else f", against {found.reference} in float"
        yield (
            f"Quality on {counted(found.tokens, 'token')}, second half of "
            f"{counted(found.chunks, 'chunk')} of {found.context}{against}."
        )


def _legend(comparison: Comparison) -> str:
    items = []
    for index, one in enumerate(comparison.artifacts):
        sign = f'<svg viewBox="0 0 16 16">{marker(_series(index), 8, 8, one.name, 5.5)}</svg>'
        stored = list(one.result.schemes)
        schemes = ", ".join([name for name in stored if name != "float"] or stored or ["unknown"])
        items.append(
            f"<li>{sign}<span>{escape(one.name)} "
            f'<span class="soft">{escape(one.result.target)}, {escape(schemes)}</span></span></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _summary(comparison: Comparison) -> str:
    headers, rows = comparison.table()
    return _table(headers, rows, texts=(0, 1, len(headers) - 1))


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    kind = ['class="text"' if index in texts else "" for index in range(len(headers))]
    head = "".join(f"<th {kind[i]}>{escape(cell)}</th>" for i, cell in enumerate(headers))
    body = "".join(
        "<tr>"
        + "".join(f"<td {kind[i]}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _figures(comparison: Comparison) -> Iterator[str]:
    """Yield the plots for which there are figures."""
    ones = comparison.artifacts
    size = Axis.over("model files (MB)", [one.result.file_bytes / 1e6 for one in ones])
    quality = [point for i, one in enumerate(ones) if (point := _quality(i, one)) is not None]
    if quality and comparison.same_tokens:
        yield _quality_figure(ones, quality, size)
    elif quality:
        yield _bits_figure(ones, size)
    decode = list(_speeds(ones, "tg"))
    if decode:
        axis = Axis.over("decode (tokens/s)", [point.y + point.error for point in decode])
        plot = scatter("decode against bytes", decode, size, axis)
        yield _figure(
            "Decode against bytes", "up and left is better; bars are standard deviations", plot
        )
    prefill = [
        Point(point.series, point.label, point.y, 0, point.error) for point in _speeds(ones, "pp")
    ]
    if prefill:
        axis = Axis.over("prefill (tokens/s)", [point.x + point.error for point in prefill])
        yield _figure(
            "Prefill",
            "longer is better; lines are standard deviations",
            bars("prefill", prefill, axis),
        )
    yield from _sqnr_figure(comparison)


def _quality(index: int, one: Compared) -> Point | None:
    if one.evaluation is None:
        return None
    found = one.evaluation.divergence
    estimate = one.evaluation.perplexity if found is None else found.kld
    x = one.result.file_bytes / 1e6
    return Point(_series(index), one.name, x, estimate.value, estimate.error or 0.0)


def _quality_figure(ones: Sequence[Compared], points: Sequence[Point], size: Axis) -> str:
    note = "down and left is better; bars are standard errors"
    if ones[0].kld is None:
        # The errors of perplexities share the text: between artifacts they say little.
        points = [Point(point.series, point.label, point.x, point.y) for point in points]
        note = "down and left is better"
        axis = Axis.over("perplexity", [point.y for point in points], zero=False)
        plot = scatter("perplexity against bytes", points, size, axis)
        return _figure("Perplexity against bytes", note, plot)
    values = [max(point.y, LEAST_KLD) for point in points]
    if max(values) > 5 * min(values):
        floored = [point for point in points if point.y < LEAST_KLD]
        note += f"; at {LEAST_KLD:.0e} also what is less" if floored else ""
        points = [
            Point(point.series, point.label, point.x, value, min(point.error, 0.9 * value))
            for point, value in zip(points, values, strict=True)
        ]
        axis = Axis.log_over("mean KLD (nats), logarithmic", values)
    else:
        axis = Axis.over("mean KLD (nats)", [point.y + point.error for point in points])
    plot = scatter("divergence against bytes", points, size, axis)
    return _figure("Divergence against bytes", note, plot)


def _bits_figure(ones: Sequence[Compared], size: Axis) -> str:
    """Plot what compares between vocabularies, instead of perplexities."""
    points = [
        Point(_series(i), one.name, one.result.file_bytes / 1e6, one.bits_per_byte)
        for i, one in enumerate(ones)
        if one.bits_per_byte is not None
    ]
    axis = Axis.over("bits per byte of text", [point.y for point in points], zero=False)
    plot = scatter("bits per byte against bytes", points, size, axis)
    return _figure("Bits per byte against bytes", "down and left is better", plot)


def _speeds(ones: Sequence[Compared], kind: str) -> Iterator[Point]:
    for index, one in enumerate(ones):
        test = one.test(kind)
        if test is not None:
            speed = spread(test.rates)
            mean, deviation = speed["mean"] or 0.0, speed["stdev"] or 0.0
            yield Point(_series(index), one.name, one.result.file_bytes / 1e6, mean, deviation)


def _sqnr_figure(comparison: Comparison) -> Iterator[str]:
    """Plot per layer; artifacts with the same weights are one line, drawn for the first."""
    groups = list(_layers(comparison.tensors))
    drawn: list[tuple[int, list[tuple[int, float]]]] = []
    for place, name in enumerate(comparison.read):
        values = [
            (at, ratio)
            for at, (_, tensors) in enumerate(groups)
            if (ratio := _layer_sqnr(tensors, place)) is not None
        ]
        if values and values not in [known for _, known in drawn]:
            index = [one.name for one in comparison.artifacts].index(name)
            drawn.append((_series(index), values))
    if not drawn:
        return
    heights = [value for _, values in drawn for _, value in values]
    axis = Axis.over("SQNR (dB)", heights, zero=False)
    names = [name for name, _ in groups]
    plot = lines("SQNR per layer", drawn, names, "layer", axis)
    note = "signal to quantization noise of the weights; up is better, equal weights are one line"
    yield _figure("Weights per layer", note, plot)


def _layers(tensors: Sequence[TensorComparison]) -> Iterator[tuple[str, list[TensorComparison]]]:
    """Group matrices by layer: the embedding, the layers by number, the head."""
    groups: dict[str, list[TensorComparison]] = {}
    for tensor in tensors:
        if len(tensor.shape) == 2:
            groups.setdefault(_layer(tensor.tensor), []).append(tensor)
    yield from groups.items()


def _layer(name: str) -> str:
    if name in (EMBEDDING, HEAD):
        return "emb" if name == EMBEDDING else "head"
    return name.removeprefix("model.layers.").partition(".")[0]


def _layer_sqnr(tensors: Sequence[TensorComparison], place: int) -> float | None:
    """Return the ratio of all signal to all noise of a layer's matrices."""
    noises = [tensor.noise[place] for tensor in tensors]
    signals = [tensor.signal for tensor in tensors]
    if None in noises or None in signals:
        return None
    return known_ratio_db(sum(filter(None, signals)), sum(filter(None, noises)))


def _figure(title: str, note: str, plot: str) -> str:
    return (
        f"<figure><figcaption>{escape(title)}"
        f'<span class="soft">{escape(note)}</span></figcaption>{plot}</figure>'
    )


def _weights(comparison: Comparison) -> Iterator[str]:
    yield "<h2>Weights</h2>"
    for one in comparison.artifacts:
        verdict = comparison.weights_verdict(one.name)
        if verdict is not None and verdict != "baseline":
            differ = f" from {comparison.read[0]}" if verdict.endswith("differ") else ""
            yield f"<p>{escape(f'{one.name}: {verdict}{differ}.')}</p>"
        if one.unread:
            yield f'<p class="soft">{escape(f"{one.name}: {one.unread}.")}</p>'
    if not comparison.tensors:
        return
    headers, rows = _tensor_rows(comparison)
    yield (
        f"<details><summary>{counted(len(rows), 'tensor')} one by one</summary>"
        f"{_table(headers, rows, texts=(0,))}</details>"
    )


def _tensor_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    headers = ["tensor", "shape"]
    headers += [f"{name}: max |difference|" for name in comparison.read[1:]]
    if comparison.reference is not None:
        headers += [f"{name}: SQNR dB" for name in comparison.read]
    rows = []
    for tensor in comparison.tensors:
        row = [tensor.tensor, "x".join(map(str, tensor.shape))]
        row += [_difference(value) for value in tensor.differences[1:]]
        if comparison.reference is not None:
            row += ["-" if ratio is None else f"{ratio:.1f}" for ratio in tensor.sqnr]
        rows.append(row)
    return headers, rows


def _difference(value: float | None) -> str:
    if value is None:
        return "-"
    return "identical" if value == 0 else f"{value:.3g}"
