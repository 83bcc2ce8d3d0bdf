"""`export`: from a model's name to a verified artifact folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekit.common.files import sha256_of
from edgekit.common.last_words import half_written
from edgekit.common.progress import Progress, Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.stored import refusal, stored_rows, stored_table
from edgekit.exporters.contract.target import Job, Options, Target, check_model, find_target
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.gguf.llama.formats import FORMATS
from edgekit.exporters.gguf.llama.quantize import quantizer_version
from edgekit.exporters.gguf.readback import StoredWeights
from edgekit.exporters.registry import TARGETS
from edgekit.formats.artifact.manifest import DecoderManifest, Manifest
from edgekit.formats.artifact.parts import AdapterFacts, ModelFacts, TensorRow
from edgekit.formats.artifact.write import copy_tokenizer, new_artifact, write_manifest
from edgekit.models.codes import CodesFile
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource, resolve_model
from edgekit.quantize.recipe import Recipe, Resolved, Rule, method_of, resolve
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.tensor import Weight
from edgekit.runtime.engines.engine import EngineMissing, import_engine
from edgekit.version import __version__
from edgekit.workflows.calibrate import workspace_of
from edgekit.workflows.mixed_precision import CANDIDATES, CountBytes, Mixed, least_bytes
from edgekit.workflows.quality import Quality
from edgekit.workflows.quantize import Made, choose_recipe, write_codes
from edgekit.workflows.verify import expected_logits, verification_tokens, verify_file

MIN_CONTEXT = 16
"""Fewest tokens that are worth a file.

One has no length to trace, and at two ExecuTorch decodes the second wrong (cause not found).
"""


@dataclass(frozen=True)
class Plan:
    """What an export will write, known before any weight is read.

    `rows` say what edgekit quantizes, `table` what the file will hold (`table_json`): one of
    llama.cpp's formats is made of float rows. With `codes` nothing is quantized. `mixed` is what
    the budget of `quality` chose.
    """

    source: ModelSource
    recipe: Recipe
    rows: Sequence[Resolved]
    tied: Mapping[str, str]
    table: list[dict[str, Any]]
    context: int
    target: str
    options: Options
    codes: CodesFile | None = None
    quality: Quality = field(default_factory=Quality)
    mixed: Mixed | None = None

    @property
    def writer(self) -> Target:
        """The module that writes the target's file."""
        return find_target(self.target, self.options)

    @property
    def model_file(self) -> str:
        """The engine's file in the artifact."""
        writer = self.writer
        return writer.model_file(stored_rows(self.rows, writer.HELD_AS_SUCH), self.options)


def plan_export(
    model: str,
    target: str,
    recipe: Recipe,
    context: int | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    options: Options | None = None,
    codes: Path | None = None,
    quality: Quality | None = None,
    steps: Steps | None = None,
    adapter: Path | None = None,
) -> Plan:
    """Resolve names, schemes and limits; every refusal that needs no weights happens here.

    `recipe` is `format_recipe`'s where the options name one of llama.cpp's formats, and has no
    meaning for `codes`, a file whose codes are packed as they are. `adapter` is merged into the
    weights. For a budget the cost of each tensor is measured here, and `steps` is told.
    """
    quality = quality or Quality()
    options = options or Options()
    writer = find_target(target, options)
    source = resolve_model(model, revision=revision, random_weights=random_weights, adapter=adapter)
    try:
        check_model(writer, source.config, options)
    except EdgekitError as error:
        raise EdgekitError(f"{source.id}: {str(error).removeprefix('config: ')}") from error
    stored = None if codes is None else CodesFile.open(codes, source.config)
    shapes, tied = source.config.tied_shapes()
    limit = source.config.max_context
    context = source.config.default_context if context is None else context
    least = min(MIN_CONTEXT, limit)
    if not least <= context <= limit:
        raise EdgekitError(f"--context {context}: {source.id} takes {least} to {limit} tokens")
    mixed = None
    if codes is None and options.llama_format is None:
        recipe, mixed = choose_recipe(
            source,
            recipe,
            quality,
            _schemes(writer, shapes),
            _counter(writer),
            steps,
            others=lambda: _other_targets(target, source.config),
        )
    rows: Sequence[Resolved] = resolve(recipe, shapes) if stored is None else stored.rows
    if stored is not None:
        recipe, tied = Recipe((), stored.about.recipe), dict(stored.tied)
    try:
        writer.check_rows(stored_rows(rows, writer.HELD_AS_SUCH))
    except EdgekitError as error:
        raise refusal(error, rows, writer.HELD_AS_SUCH) from error
    table = _table(source, rows, tied, options, writer)
    return Plan(source, recipe, rows, tied, table, context, target, options, stored, quality, mixed)


def _schemes(writer: Target, shapes: Mapping[str, tuple[int, ...]]) -> list[Scheme]:
    """Return the schemes that a target holds as such, embedding and head included."""
    found = []
    for scheme in map(Scheme.parse, CANDIDATES):
        try:
            rows = resolve(Recipe((Rule(".*", scheme),)), shapes)
            writer.check_rows(rows)
        except EdgekitError:
            continue
        if stored_rows(rows, writer.HELD_AS_SUCH) == rows:
            found.append(scheme)
    return found


def _counter(writer: Target) -> CountBytes:
    """Return what counts the bytes of a table in the target's file."""

    def count(rows: Sequence[Resolved], tied: Mapping[str, str]) -> int:
        stored = stored_rows(rows, writer.HELD_AS_SUCH)
        once = writer.stored_once(stored, tied)
        return sum(writer.stored_bytes(row) for row in stored if row.tensor not in once)

    return count


def _other_targets(target: str, config: ModelConfig) -> dict[str, int]:
    """Return the other targets as a user gives them, with the fewest bytes a budget has there."""
    found = {}
    for name in TARGETS.names("decoder"):
        if name != target:
            writer = find_target(name, Options())
            schemes = _schemes(writer, config.tied_shapes()[0])
            found[f"--target {name}"] = least_bytes(config, schemes, _counter(writer))
    return found


@contextmanager
def with_codes(
    plan: Plan, output: Path, steps: Steps | None = None
) -> Iterator[tuple[Plan, Made | None]]:
    """Give the plan to export, and what was found while its codes were chosen.

    Where a calibration or a budget was asked for, codes are written to a hidden file beside
    `output`, which is there until the block ends; what is done of a calibration outlives a kill.
    Else the plan is as it was.
    """
    if plan.codes is not None or not plan.quality.given:
        yield plan, None
        return
    with workspace_of(output) as workspace:
        path = workspace / "codes.safetensors"
        try:
            made = write_codes(plan.source, plan.recipe, plan.quality, path, workspace, steps)
            codes = CodesFile.open(path, plan.source.config)
            with half_written(path):
                yield replace(plan, codes=codes, rows=codes.rows, tied=codes.tied), made
        finally:
            path.unlink(missing_ok=True)


def _table(
    source: ModelSource,
    rows: Sequence[Resolved],
    tied: Mapping[str, str],
    options: Options,
    writer: Target,
) -> list[dict[str, Any]]:
    if options.llama_format is None:
        return stored_table(rows, tied, writer.HELD_AS_SUCH)
    from edgekit.exporters.gguf.decoder import planned_table

    form = FORMATS[options.llama_format]
    return planned_table(source.config, rows, tied, form, options.imatrix)


def _check_table(path: Path, config: ModelConfig, table: list[dict[str, Any]]) -> None:
    from edgekit.exporters.gguf.decoder import check_table

    check_table(path, config, table)


def export_plan(plan: Plan, output: Path, force: bool, progress: Progress) -> Manifest:
    """Quantize, export, verify in the engine; return the manifest of the folder `output`.

    The caller has let `check_output` judge that folder. Where the engine is not installed the
    manifest says that the file is not verified, and why. Raises EdgekitError, and leaves nothing,
    for a mistake of the user's; VerificationError where the file does not compute what the model
    computes.
    """
    source, writer = plan.source, plan.writer
    tokens = verification_tokens(source, plan.context)
    missing = _missing_engine(plan.target)
    checkpoint = source.checkpoint  # here a model on the hub is downloaded
    if plan.codes is not None:
        progress("reading the model")
        _check_origin(plan.codes, source)
    with new_artifact(output, force) as folder:
        progress("quantizing" if plan.codes is None else "reading the codes")
        origin = checkpoint if plan.codes is None else plan.codes
        weights = Weights(plan.rows, plan.tied, origin, writer.HELD_AS_SUCH)
        if missing is None and plan.options.llama_format is None:
            progress("computing the reference")
            expected = expected_logits(source, weights, tokens, writer)
        job = Job(
            source.id,
            source.config,
            stored_rows(plan.rows, writer.HELD_AS_SUCH),
            plan.tied,
            weights,
            plan.context,
            source.folder,
            plan.options,
        )
        _write_config(source, folder)
        writer.write(job, folder, progress)
        weights.clear()
        path = folder / plan.model_file
        if plan.options.llama_format is not None:
            _check_table(path, source.config, plan.table)
        if missing is None and plan.options.llama_format is not None:
            progress("computing the reference")
            expected = expected_logits(source, StoredWeights(path, source.config), tokens, writer)
        if missing is None:
            progress(f"verifying in {writer.ENGINE}")

            def again() -> Mapping[str, Weight]:
                if plan.options.llama_format is not None:
                    return StoredWeights(path, source.config)
                return Weights(plan.rows, plan.tied, origin, writer.HELD_AS_SUCH)

            figures = verify_file(writer, path, plan.context, expected, source, again)
        else:
            figures = {"verified": False, "reason": missing}
        progress("finishing")
        if source.folder is not None:
            copy_tokenizer(source.folder, folder)
        return write_manifest(folder, _manifest(plan, figures))


def _missing_engine(name: str) -> str | None:
    """Return why the target's engine cannot run here, None where it can."""
    try:
        import_engine(name)
    except EngineMissing as error:
        return str(error)
    return None


def _check_origin(codes: CodesFile, source: ModelSource) -> None:
    """Refuse codes of another model's weights, and those whose training began with others."""
    about = codes.about
    if about.sha256 != source.checkpoint.sha256():
        raise EdgekitError(
            f"{codes.path}: was made of other weights than those of {source.id}: of a model "
            f"called {about.model}"
        )


def _write_config(source: ModelSource, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(source.config.to_dict(), indent=1) + "\n")


def _manifest(plan: Plan, verification: dict[str, Any]) -> DecoderManifest:
    source, codes, adapter = plan.source, plan.codes, plan.source.adapter
    return DecoderManifest(
        model=ModelFacts(
            id=source.id,
            revision=source.revision,
            random_weights=source.random_weights,
            sha256=source.checkpoint.sha256(),
            parameters=source.config.parameter_count,
            adapter=None if adapter is None else AdapterFacts.from_json(adapter.to_dict()),
        ),
        target=plan.target,
        file=plan.model_file,
        recipe=plan.recipe.name,
        method=_method(plan),
        codes_sha256=None if codes is None else sha256_of(codes.path),
        facts={} if codes is None else dict(codes.about.facts),
        llama_format=plan.options.llama_format,
        tensors=tuple(map(TensorRow.from_json, plan.table)),
        versions={"edgekit": __version__, **plan.writer.versions(), **_quantizer(plan)},
        requires=plan.writer.requires(plan.options),
        context=plan.context,
        bos_id=source.config.bos_id,
        eos_ids=tuple(source.config.eos_ids),
        verification=verification,
    )


def _method(plan: Plan) -> str | None:
    """Return how the codes were chosen; of a format of llama.cpp's nobody says it."""
    if plan.codes is not None:
        return plan.codes.about.method
    return None if plan.options.llama_format is not None else method_of(plan.rows)


def _quantizer(plan: Plan) -> dict[str, str]:
    """Return the version of what quantized one of llama.cpp's formats."""
    return {} if plan.options.llama_format is None else quantizer_version()
