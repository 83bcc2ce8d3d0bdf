"""`export`: from a model's name to a verified artifact folder."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.common.files import sha256_of
from edgekit.common.last_words import half_written
from edgekit.common.progress import Progress, Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.own_formats import OwnFormats, own_formats
from edgekit.exporters.contract.stored import stored
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import Job, load_writer
from edgekit.exporters.verify.decoder import check_format_cost
from edgekit.formats.artifact.manifest import DecoderManifest, Manifest
from edgekit.formats.artifact.parts import AdapterFacts, ModelFacts, TensorRow
from edgekit.formats.artifact.write import copy_tokenizer, new_artifact, write_manifest
from edgekit.models.codes import CodesFile
from edgekit.models.source import ModelSource
from edgekit.quantize.recipe import method_of
from edgekit.quantize.tensor import Weight
from edgekit.runtime.engines.engine import EngineMissing, import_engine
from edgekit.version import __version__
from edgekit.workflows.calibrate import workspace_of
from edgekit.workflows.plan import Plan
from edgekit.workflows.quantize import Quantized, write_codes
from edgekit.workflows.verify import expected_logits, verification_tokens, verify_file


@contextmanager
def with_codes(
    plan: Plan, output: Path, steps: Steps | None = None
) -> Iterator[tuple[Plan, Quantized | None]]:
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
                table = replace(codes.table, native=plan.table.native)
                yield replace(plan, codes=codes, table=table), made
        finally:
            path.unlink(missing_ok=True)


def export_plan(plan: Plan, output: Path, force: bool, progress: Progress) -> Manifest:
    """Quantize, export, verify in the engine; return the manifest of the folder `output`.

    The caller has let `check_output` judge that folder. Where the engine is not installed the
    manifest says that the file is not verified, and why. Raises EdgekitError, and leaves nothing,
    for a mistake of the user's; VerificationError where the file does not compute what the model
    computes.
    """
    source, writer = plan.source, load_writer(plan.target)
    tokens = verification_tokens(source, plan.context)
    missing = _missing_engine(plan.target)
    formats = _own_formats(plan)
    checkpoint = source.checkpoint  # here a model on the hub is downloaded
    if plan.codes is not None:
        progress("reading the model")
        _check_origin(plan.codes, source)
    with new_artifact(output, force) as folder:
        progress("quantizing" if plan.codes is None else "reading the codes")
        origin = checkpoint if plan.codes is None else plan.codes
        weights = Weights(plan.table, origin)
        if missing is None and formats is None:
            progress("computing the reference")
            expected = expected_logits(source, weights, tokens, writer.fake_quantize)
        job = Job(
            source.id,
            source.config,
            stored(plan.table),
            weights,
            plan.context,
            source.folder,
            plan.options,
        )
        _write_config(source, folder)
        writer.write(job, folder, progress)
        weights.clear()
        path = folder / plan.model_file

        def written() -> Mapping[str, Weight]:
            if formats is not None:
                return formats.stored_weights(path, source.config)
            return Weights(plan.table, origin)

        if formats is not None:
            formats.check_table(path, source.config, plan.listing)
        if missing is None and formats is not None:
            progress("computing the reference")
            expected = expected_logits(source, written(), tokens, writer.fake_quantize)
            check_format_cost(expected)
        if missing is None:
            progress(f"verifying in {plan.layout.ENGINE}")
            figures = verify_file(plan.target, path, plan.context, expected, source, written)
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
        tensors=tuple(map(TensorRow.from_json, plan.listing)),
        versions={"edgekit": __version__, **_versions(plan)},
        requires=plan.layout.requires(plan.options),
        context=plan.context,
        bos_id=source.config.bos_id,
        eos_ids=tuple(source.config.eos_ids),
        verification=verification,
    )


def _method(plan: Plan) -> str | None:
    """Return how the codes were chosen; of a format of llama.cpp's nobody says it."""
    if plan.codes is not None:
        return plan.codes.about.method
    return None if plan.options.llama_format is not None else method_of(plan.table)


def _versions(plan: Plan) -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    formats = _own_formats(plan)
    found = load_writer(plan.target).versions()
    return found if formats is None else found | formats.versions()


def _own_formats(plan: Plan) -> OwnFormats | None:
    """Return the target's own formats where one was asked for."""
    return None if plan.options.llama_format is None else own_formats(plan.target)
