"""`compare`: artifacts side by side, in size, quality, speed, memory and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edgekit.common.progress import Steps, no_steps
from edgekit.common.tables import fitting_table
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored_size import StoredSize
from edgekit.exporters.readback import (
    NamedTensors,
    TensorComparison,
    compare_weights,
    read_weights,
    stored_size,
)
from edgekit.models.config import ModelConfig
from edgekit.models.eager import float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.runtime.bench.decoder import (
    DecoderResult,
    ShapeResult,
    bench,
    check_contexts,
    describe_each,
    plan,
)
from edgekit.runtime.bench.record import Record, spread
from edgekit.runtime.bench.tables import disturbances
from edgekit.runtime.engines.engine import check_threads
from edgekit.runtime.evaluation.evaluate import (
    DEFAULT_CHUNK,
    Evaluation,
    check_chunk_length,
    evaluate_each,
)
from edgekit.runtime.model_files import ModelFile, find_model_file

OTHER_TOKENS = (
    "* perplexities of different tokens, for vocabularies differ: they do not compare; bits per "
    "byte of the text do"
)
_NOTHING = "-"


@dataclass(frozen=True)
class Compared:
    """One artifact's row: its place in the benchmark, its evaluation, its parameters.

    `evaluation` is None without a text, `size` where the file does not tell, and `unread`, which
    says why weights could not be read back, where they could.
    """

    result: DecoderResult
    size: StoredSize | None
    evaluation: Evaluation | None
    unread: str | None

    @property
    def name(self) -> str:
        """The name that distinguishes it from the others."""
        return self.result.name

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of the tensors' bytes over the number of weights, as `inspect` has them."""
        return None if self.size is None else self.size.bits_per_weight

    @property
    def peak_bytes(self) -> int | None:
        """Memory while the tests ran; None where none ran."""
        return self.result.memory.peak if self.result.tests else None

    @property
    def perplexity(self) -> float | None:
        """Of the text's tokens, which are those of the model's own vocabulary."""
        return None if self.evaluation is None else self.evaluation.perplexity.value

    @property
    def bits_per_byte(self) -> float | None:
        """Bits in which the model says a byte of the text."""
        return None if self.evaluation is None else self.evaluation.bits_per_byte

    @property
    def kld(self) -> float | None:
        """Mean divergence from the reference in nats."""
        found = None if self.evaluation is None else self.evaluation.divergence
        return None if found is None else found.kld.value

    @property
    def engine_version(self) -> str | None:
        """The version of the engine that ran it; None where none did."""
        if self.result.engine_version is not None or self.evaluation is None:
            return self.result.engine_version
        return self.evaluation.engine_version

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
            "engine": {"name": self.result.engine, "version": self.engine_version},
            "model": dict(self.result.model),
            "file_bytes": self.result.file_bytes,
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": None if self.size is None else self.size.nbytes,
            "peak_bytes": self.peak_bytes,
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
    record: Record[DecoderResult]
    reference: str | None
    read: tuple[str, ...]
    tensors: tuple[TensorComparison, ...]

    @property
    def same_tokens(self) -> bool:
        """Whether all that were scored read the text as the same tokens: perplexities compare."""
        scored = [one.evaluation for one in self.artifacts if one.evaluation is not None]
        return len({found.text_ids_sha256 for found in scored}) < 2

    @property
    def notes(self) -> list[str]:
        """What must be known to read the figures, and what disturbed them."""
        found = [] if self.same_tokens else [OTHER_TOKENS]
        return [*found, *disturbances(self.record)]

    def weights_verdict(self, name: str) -> str | None:
        """Say whose weights an artifact's are, or in how many tensors they differ from the first's.

        None where nothing can be said.
        """
        if name not in self.read or len(self.read) < 2:
            return None
        place = self.read.index(name)
        for earlier in range(place):
            if all(_equal(tensor, earlier, place) for tensor in self.tensors):
                return f"identical to {self.read[earlier]}"
        if place == 0:
            return "baseline"
        other = sum(not _equal(tensor, 0, place) for tensor in self.tensors)
        return f"{other} of {len(self.tensors)} differ"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON data; `bench` is the record of the benchmark."""
        return {
            "artifacts": [
                one.to_dict() | {"weights": self.weights_verdict(one.name)}
                for one in self.artifacts
            ],
            "reference": self.reference,
            "same_tokens": self.same_tokens,
            "weights_of": list(self.read),
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "bench": self.record.to_dict(),
        }

    def text(self) -> str:
        """Return the table, and a line for what could not be known or disturbed a speed."""
        headers, rows = self.table()
        table = fitting_table(headers, rows, align="ll" + "r" * (len(headers) - 3) + "l")
        notes = [f"{one.name}: {one.unread}" for one in self.artifacts if one.unread]
        notes += self.notes
        return "\n\n".join([table, "\n".join(notes)] if notes else [table])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headers and rows, one row per artifact."""
        tests = {test.shape.kind: test.shape.name for test in self.artifacts[0].result.tests}
        quality = ["perplexity"] if self.same_tokens else ["perplexity*", "bits/byte"]
        headers = ["artifact", "engine", "MB", "bits/weight", *quality, "KLD"]
        headers += [f"{tests.get(kind, kind)} tok/s" for kind in ("pp", "tg")]
        headers += ["peak MB", "weights"]
        return headers, [self._row(one) for one in self.artifacts]

    def _row(self, one: Compared) -> list[str]:
        bits, peak = one.bits_per_weight, one.peak_bytes
        quality = [_NOTHING if one.perplexity is None else f"{one.perplexity:.4f}"]
        if not self.same_tokens:
            quality.append(_NOTHING if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}")
        return [
            one.name,
            " ".join(filter(None, (one.result.engine, one.engine_version))),
            f"{one.result.file_bytes / 1e6:,.1f}",
            _NOTHING if bits is None else f"{bits:.2f}",
            *quality,
            _NOTHING if one.kld is None else f"{one.kld:.6f}",
            _speed(one.test("pp")),
            _speed(one.test("tg")),
            _NOTHING if peak is None else f"{peak / 1e6:,.0f}",
            self.weights_verdict(one.name) or _NOTHING,
        ]


def _equal(tensor: TensorComparison, one: int, other: int) -> bool:
    return tensor.same_as[one] is not None and tensor.same_as[one] == tensor.same_as[other]


def compare(
    artifacts: Sequence[Path],
    text: str | None = None,
    reference: str | None = None,
    *,
    context: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    prompt: int = 512,
    generate: int = 128,
    repetitions: int = 3,
    threads: int | None = None,
    tokenizer: Path | None = None,
    progress: Steps | None = None,
) -> Comparison:
    """Measure artifacts and compare them, with each other and with a reference model.

    An artifact is a folder that `edgekit export` wrote, or what `find_model_file` takes besides.
    `text` and `tokenizer` are those of `evaluate`, `reference` the model that the artifacts stand
    for, `prompt`, `generate` and `repetitions` the benchmark's; 0 and 0 tokens leave speed and
    memory out, and no engine is needed then unless there is a text. Raises `EdgekitError` for what
    one of these refuses; what needs no weights is checked before any is read.
    """
    show = progress or no_steps
    check_threads(threads)
    check_chunk_length(context)
    timed = prompt > 0 or generate > 0
    check_contexts(artifacts, plan((prompt,), (generate,), (0,)) if timed else [])
    files = [find_model_file(path) for path in artifacts]
    source = None if reference is None else resolve_model(reference)
    weights = _compare_weights(files, source, show)
    evaluations: list[Evaluation | None] = [None] * len(files)
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
                tokenizer=tokenizer,
                progress=_prefixed(show, "quality: "),
            )
        ]
    record = (
        bench(
            artifacts,
            (prompt,),
            (generate,),
            repetitions=repetitions,
            threads=threads,
            progress=_prefixed(show, "speed: "),
        )
        if timed
        else describe_each(artifacts, threads)
    )
    rows = tuple(
        Compared(result, size, evaluation, unread)
        for result, size, evaluation, unread in zip(
            record.artifacts, weights.sizes, evaluations, weights.unread, strict=True
        )
    )
    read = tuple(record.artifacts[index].name for index in weights.read)
    return Comparison(rows, record, reference, read, tuple(weights.tensors))


@dataclass(frozen=True)
class _Weights:
    """What reading the files' weights brought: per file its size and why it was not read.

    `read` are the indices of the files that were, whose weights `tensors` compares.
    """

    sizes: list[StoredSize | None]
    unread: list[str | None]
    read: list[int]
    tensors: list[TensorComparison]


def _compare_weights(
    files: Sequence[ModelFile], source: ModelSource | None, progress: Steps
) -> _Weights:
    """Compare all files that can be read to their ends; begin again without one that cannot."""
    common = _common_config(files, source)
    configs = [_config(file) or common for file in files]
    unread: list[str | None] = [None] * len(files)
    while True:
        read = [index for index in range(len(files)) if unread[index] is None]
        streams = [_guarded(files[index], configs[index], index, unread) for index in read]
        tensors = list[TensorComparison]()
        for tensor in compare_weights(streams, _float_reader(source)):
            tensors.append(tensor)
            progress(len(tensors), len(tensors), f"weights: {tensor.tensor}")
        if not any(unread[index] for index in read):
            break
    sizes = [_size(file, config) for file, config in zip(files, configs, strict=True)]
    return _Weights(sizes, unread, read, tensors)


def _guarded(
    file: ModelFile, config: ModelConfig | None, index: int, unread: list[str | None]
) -> NamedTensors:
    """Yield a file's tensors; an error ends them and is noted."""
    try:
        if config is None:
            raise EdgekitError(f"{file.place}: nothing says which model's tensors it holds")
        yield from read_weights(file.engine, file.path, config)
    except EdgekitError as error:
        unread[index] = str(error)


def _config(file: ModelFile) -> ModelConfig | None:
    """Return the configuration of an artifact of ours."""
    return None if file.manifest is None else ModelConfig.load(file.place)


def _common_config(files: Sequence[ModelFile], source: ModelSource | None) -> ModelConfig | None:
    """Return what a foreign file is read by: the reference's, or that of the first artifact."""
    if source is not None:
        return source.config
    return next((config for file in files if (config := _config(file)) is not None), None)


def _size(file: ModelFile, config: ModelConfig | None) -> StoredSize | None:
    """Return the bytes of a file's tensors; None where they cannot be told from the rest."""
    try:
        return stored_size(file.engine, file.path, config)
    except EdgekitError:
        return None


def _float_reader(source: ModelSource | None) -> Callable[[str], Tensor | None] | None:
    """Return a reader of the reference's tensors, None for a name that it has not."""
    if source is None:
        return None
    shapes, _ = source.config.tied_shapes()
    read = float_reader(source.config, source.checkpoint)
    return lambda name: read(name) if name in shapes else None


def _prefixed(progress: Steps, prefix: str) -> Steps:
    return lambda done, total, label: progress(done, total, prefix + label)


def _speed(test: ShapeResult | None) -> str:
    if test is None:
        return _NOTHING
    speed = spread(test.rates)
    mean, deviation = speed["mean"] or 0.0, speed["stdev"]
    decimals = 0 if mean >= 1000 else 1
    spread_text = "" if deviation is None else f" ± {deviation:,.{decimals}f}"
    return f"{mean:,.{decimals}f}{spread_text}" + (" !" if test.disturbed else "")
