"""`compare`: artifacts side by side, in size, quality, speed, memory and weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError
from edgekit.exporters.weights import NamedTensors, TensorComparison, compare_weights, read_weights
from edgekit.models.checkpoint import WeightSource
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model
from edgekit.quantize.recipe import EMBEDDING, HEAD
from edgekit.runtime.bench import bench
from edgekit.runtime.evaluate import DEFAULT_CONTEXT, Evaluation, evaluate_each
from edgekit.runtime.record import ArtifactResult, Record, ShapeResult, spread
from edgekit.tables import markdown_table

_NOTHING = "-"
Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next) of each part of the work."""


@dataclass(frozen=True)
class Compared:
    """One artifact's column: its place in the benchmark, its evaluation, its size.

    `evaluation` is None without a text; `parameters` and `unread`, why its weights could not be
    read back, are None where that is not known or not so.
    """

    result: ArtifactResult
    model_bytes: int
    parameters: int | None
    evaluation: Evaluation | None
    unread: str | None

    @property
    def name(self) -> str:
        """The name that distinguishes it from the others."""
        return self.result.name

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of the model's files over the model's parameters."""
        return 8 * self.model_bytes / self.parameters if self.parameters else None

    @property
    def kld(self) -> float | None:
        """Mean divergence from the reference in nats."""
        found = None if self.evaluation is None else self.evaluation.divergence
        return None if found is None else found.kld.value

    def test(self, kind: str) -> ShapeResult | None:
        """The prefill (`pp`) or the decode (`tg`), None where it was not asked for."""
        return next((test for test in self.result.tests if test.shape.kind == kind), None)

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON data."""
        speeds = {kind: self.test(kind) for kind in ("pp", "tg")}
        return {
            "name": self.name,
            "path": self.result.path,
            "target": self.result.target,
            "engine": {"name": self.result.engine, "version": self.result.engine_version},
            "model": dict(self.result.model),
            "model_bytes": self.model_bytes,
            "bits_per_weight": self.bits_per_weight,
            "peak_bytes": self.result.memory.peak,
            "tokens_per_second": {
                kind: None if test is None else {"test": test.shape.name, **spread(test.rates)}
                for kind, test in speeds.items()
            },
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
            "weights_unread": self.unread,
        }


@dataclass(frozen=True)
class Comparison:
    """Artifacts side by side.

    `tensors` compares the weights of `read`, the artifacts whose weights can be read back, each
    with the first of them, and where there is a reference with its float weights.
    """

    artifacts: tuple[Compared, ...]
    record: Record
    reference: str | None
    read: tuple[str, ...]
    tensors: tuple[TensorComparison, ...]

    def weights_verdict(self, name: str) -> str | None:
        """Say how an artifact's weights compare with the first's; None where that is not known."""
        if name not in self.read or len(self.read) < 2:
            return None
        place = self.read.index(name)
        if place == 0:
            return "baseline"
        found = [tensor.differences[place] for tensor in self.tensors]
        other = sum(difference != 0 for difference in found)
        return f"{other} of {len(found)} differ" if other else "identical"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data; `bench` is the record of the benchmark."""
        return {
            "artifacts": [
                one.to_dict() | {"weights": self.weights_verdict(one.name)}
                for one in self.artifacts
            ],
            "reference": self.reference,
            "weights_of": list(self.read),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "bench": self.record.to_dict(),
        }

    def text(self) -> str:
        """Return the table, and a line for what could not be known."""
        table = markdown_table(*self.table(), align="llrrrrrrrl")
        notes = [f"{one.name}: {one.unread}" for one in self.artifacts if one.unread]
        return "\n\n".join([table, "\n".join(notes)] if notes else [table])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headers and rows, one row per artifact."""
        tests = {test.shape.kind: test.shape.name for test in self.artifacts[0].result.tests}
        headers = ["artifact", "engine", "MB", "bits/weight", "perplexity", "KLD"]
        headers += [f"{tests.get(kind, kind)} tok/s" for kind in ("pp", "tg")]
        headers += ["peak MB", "weights"]
        return headers, [self._row(one) for one in self.artifacts]

    def _row(self, one: Compared) -> list[str]:
        bits, peak = one.bits_per_weight, one.result.memory.peak
        evaluation = one.evaluation
        return [
            one.name,
            f"{one.result.engine} {one.result.engine_version}",
            f"{one.model_bytes / 1e6:,.1f}",
            _NOTHING if bits is None else f"{bits:.2f}",
            _NOTHING if evaluation is None else f"{evaluation.perplexity.value:.4f}",
            _NOTHING if one.kld is None else f"{one.kld:.6f}",
            _speed(one.test("pp")),
            _speed(one.test("tg")),
            _NOTHING if peak is None else f"{peak / 1e6:,.0f}",
            self.weights_verdict(one.name) or _NOTHING,
        ]


def compare(
    artifacts: Sequence[Path],
    text: str | None = None,
    reference: str | None = None,
    *,
    context: int = DEFAULT_CONTEXT,
    chunks: int | None = None,
    prompt: int = 512,
    generate: int = 128,
    repetitions: int = 3,
    threads: int | None = None,
    progress: Progress = lambda done, total, label: None,
) -> Comparison:
    """Measure artifacts and compare them, with each other and with a reference model.

    `text` is scored as `evaluate` does it, `reference` is the model that they stand for, `prompt`,
    `generate` and `repetitions` are the benchmark's. Raises `EdgekitError` for what one of these
    refuses, before the long work where it can be known before.
    """
    opened = [Artifact.open(path) for path in artifacts]
    source = None if reference is None else resolve_model(reference).checkpoint
    read, unread, tensors = _compare_weights(opened, source, progress)
    evaluations: list[Evaluation | None] = [None] * len(opened)
    if text is not None:
        names = [str(path) for path in artifacts]
        evaluations = [
            *evaluate_each(
                names,
                text,
                reference,
                context=context,
                chunks=chunks,
                threads=threads,
                progress=_prefixed(progress, "quality: "),
            )
        ]
    record = bench(
        artifacts,
        (prompt,),
        (generate,),
        repetitions=repetitions,
        threads=threads,
        progress=_prefixed(progress, "speed: "),
    )
    columns = tuple(
        Compared(result, model_bytes(artifact), _parameters(artifact), evaluation, unread[i])
        for i, (artifact, evaluation, result) in enumerate(
            zip(opened, evaluations, record.artifacts, strict=True)
        )
    )
    return Comparison(
        columns,
        record,
        reference,
        tuple(record.artifacts[i].name for i in read),
        tensors,
    )


def model_bytes(artifact: Artifact) -> int:
    """Return the bytes of the model's files, external data included, without tokenizer's files."""
    stem = Path(str(artifact.manifest["file"])).stem
    return sum(
        int(facts["bytes"])
        for name, facts in artifact.manifest["files"].items()
        if name.startswith(f"{stem}.")
    )


def _parameters(artifact: Artifact) -> int | None:
    count = artifact.manifest["model"].get("parameters")
    return count if type(count) is int and count > 0 else None


def _compare_weights(
    artifacts: Sequence[Artifact], source: WeightSource | None, progress: Progress
) -> tuple[list[int], list[str | None], tuple[TensorComparison, ...]]:
    """Return the indices of the artifacts that can be read, why others cannot, and the tensors."""
    streams, read = list[NamedTensors](), list[int]()
    unread: list[str | None] = [None] * len(artifacts)
    for index, artifact in enumerate(artifacts):
        try:
            streams.append(_started(read_weights(artifact)))
            read.append(index)
        except EdgekitError as error:
            unread[index] = str(error)
    if not streams:
        return read, unread, ()
    found = list[TensorComparison]()
    total = len(ModelConfig.load(artifacts[read[0]].folder).tensor_shapes())
    for tensor in compare_weights(streams, _float_reader(source)):
        found.append(tensor)
        progress(min(len(found), total), total, f"weights: {tensor.tensor}")
    return read, unread, tuple(found)


def _started(stream: NamedTensors) -> NamedTensors:
    """Read the first tensor now, so that a file that cannot be read says so here."""
    first = next(stream)

    def whole() -> Iterator[tuple[str, Tensor]]:
        yield first
        yield from stream

    return whole()


def _float_reader(source: WeightSource | None) -> Callable[[str], Tensor | None] | None:
    """Return a reader of the reference's tensors, None for a name that it has not."""
    if source is None:
        return None
    known = source.shapes()

    def read(name: str) -> Tensor | None:
        if name == HEAD and HEAD not in known:
            name = EMBEDDING
        return source.tensor(name) if name in known else None

    return read


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda done, total, label: progress(done, total, prefix + label)


def _speed(test: ShapeResult | None) -> str:
    if test is None:
        return _NOTHING
    speed = spread(test.rates)
    mean, deviation = speed["mean"] or 0.0, speed["stdev"]
    decimals = 0 if mean >= 1000 else 1
    return f"{mean:,.{decimals}f}" + ("" if deviation is None else f" ± {deviation:,.{decimals}f}")
