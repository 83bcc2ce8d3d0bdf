"""`export`: from a model's name to a verified artifact folder."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import __version__
from edgekit.errors import EdgekitError
from edgekit.exporters import executorch as target_executorch
from edgekit.exporters.artifact import copy_tokenizer, new_artifact, write_manifest
from edgekit.exporters.reference_text import TEXT
from edgekit.exporters.verify import Reference, Verification, reference, verify
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import TOKENIZER_FILE, Tokenizer
from edgekit.progress import Progress
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.recipe import Recipe, Resolved, resolve, tied_shapes
from edgekit.quantize.table import table_json
from edgekit.runtime.engine import load_engine

TARGETS = ("executorch",)
VERIFY_TOKENS = 128
MIN_CONTEXT = 16
"""Fewest tokens that are worth a file.

One has no length to trace, and at two ExecuTorch decodes the second wrong (cause not found).
"""


@dataclass(frozen=True)
class Plan:
    """What an export will write, known before any weight is read."""

    source: ModelSource
    recipe: Recipe
    rows: list[Resolved]
    tied: dict[str, str]
    context: int
    target: str


def plan_export(
    model: str,
    target: str,
    recipe: Recipe,
    context: int | None = None,
    revision: str | None = None,
    random_weights: bool = False,
) -> Plan:
    """Resolve names, schemes and limits; every refusal that needs no weights happens here."""
    if target not in TARGETS:
        raise EdgekitError(f"unknown target {target!r}: allowed are {', '.join(TARGETS)}")
    source = resolve_model(model, revision=revision, random_weights=random_weights)
    shapes, tied = tied_shapes(source.config.tensor_shapes())
    rows = resolve(recipe, shapes)
    target_executorch.check_rows(rows)
    limit = source.config.max_context
    context = source.config.default_context if context is None else context
    least = min(MIN_CONTEXT, limit)
    if not least <= context <= limit:
        raise EdgekitError(f"--context {context}: {source.id} takes {least} to {limit} tokens")
    return Plan(source, recipe, rows, tied, context, target)


def export(plan: Plan, output: Path, force: bool, progress: Progress) -> dict[str, Any]:
    """Quantize, export, verify in the engine; return the manifest of the folder `output`.

    The caller has let `check_output` judge that folder. Raises EdgekitError, and leaves nothing,
    for a mistake of the user's; VerificationError where the file does not compute what the model
    computes.
    """
    source, config = plan.source, plan.source.config
    tokens = verification_tokens(source, plan.context)
    checkpoint = source.checkpoint  # here a model on the hub is downloaded
    with new_artifact(output, force) as folder:
        progress("quantizing")
        read = float_reader(config, checkpoint)
        weights = dict(quantize_tensors(plan.rows, checkpoint.tensor, plan.tied))
        progress("computing the reference")
        expected = reference(
            tokens,
            build_eager(config, read, len(tokens)),
            build_eager(config, weights.__getitem__, len(tokens)),
        )
        model_path = folder / target_executorch.MODEL_FILE
        target_executorch.export_pte(config, weights, plan.context, model_path, progress)
        progress("verifying in ExecuTorch")
        verification = _verify(plan.target, model_path, expected)
        progress("finishing")
        if source.folder is not None:
            copy_tokenizer(source.folder, folder)
        _write_config(source, folder)
        manifest = _manifest(plan, verification)
        write_manifest(folder, manifest)
    return manifest


def _verify(target: str, path: Path, expected: Reference) -> Verification:
    with load_engine(target, path) as engine:
        return verify(engine, expected)


def verification_tokens(source: ModelSource, context: int) -> list[int]:
    """Real text where the model has a tokenizer, else random tokens; never more than fits.

    Only random weights may come without a tokenizer.
    """
    limit = min(VERIFY_TOKENS, context)
    folder = source.folder
    if folder is None or (source.random_weights and not (folder / TOKENIZER_FILE).is_file()):
        draw = random.Random(0)
        return [draw.randrange(source.config.vocab_size) for _ in range(limit)]
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise EdgekitError(
            f"{folder / TOKENIZER_FILE}: has {tokenizer.vocab_size} tokens, the model's "
            f"vocabulary only {source.config.vocab_size}"
        )
    return tokenizer.encode(TEXT)[:limit]


def _write_config(source: ModelSource, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(source.config.to_dict(), indent=1) + "\n")


def _manifest(plan: Plan, verification: Verification) -> dict[str, Any]:
    source = plan.source
    return {
        "model": {
            "id": source.id,
            "revision": source.revision,
            "sha256": source.checkpoint.sha256(),
            "parameters": source.config.parameter_count,
        },
        "target": plan.target,
        "file": target_executorch.MODEL_FILE,
        "recipe": plan.recipe.name,
        "tensors": table_json(plan.rows, plan.tied),
        "versions": {"edgekit": __version__, **target_executorch.versions()},
        "context": plan.context,
        "bos_id": source.config.bos_id,
        "eos_ids": list(source.config.eos_ids),
        "verification": verification.to_dict(),
    }
