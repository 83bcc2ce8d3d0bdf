"""Codes of a model in a file, by a recipe, a calibration and a budget: `edgekit quantize`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.common.files import is_pipe, make_folder, read_text
from edgekit.common.progress import Steps, no_steps
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.metrics.divergence import Estimate
from edgekit.models.codes import CodesFile
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource
from edgekit.quantize.recipe import Recipe, method_of, resolve, with_ranges
from edgekit.quantize.schemes.names import Scheme
from edgekit.quantize.storage import About, short_text
from edgekit.quantize.write import quantize_to_file
from edgekit.workflows.calibrate import (
    quantize_calibrated,
    read_texts,
    workspace_of,
)
from edgekit.workflows.gains import Gains
from edgekit.workflows.mixed_precision import CountBytes, Mixed, mixed_recipe, table_bytes
from edgekit.workflows.quality import Quality, check_method, default_method
from edgekit.workflows.sensitivity import check_tokens, divergence_of

_END = 1000
"""Characters at the end of a calibration text: in most languages no more than a chunk's tokens."""


@dataclass(frozen=True)
class Quantized:
    """What a file of codes was found to be: each tensor's SQNR in dB, and what was asked for.

    `gains` with a calibration, `measured`, to hold against `Mixed.predicted_kld`, with a budget.
    """

    sqnr: Mapping[str, float]
    gains: Gains | None
    measured: Estimate | None


def choose_recipe(
    source: ModelSource,
    recipe: Recipe,
    quality: Quality,
    schemes: Sequence[Scheme],
    count: CountBytes = table_bytes,
    progress: Steps | None = None,
    others: Callable[[], Mapping[str, int]] = dict,
) -> tuple[Recipe, Mixed | None]:
    """Return the recipe with the ranges that were asked for, or what a budget chooses instead.

    `schemes`, `count` and `others` as in `mixed_recipe`.
    """
    mixed = None
    if quality.budget is not None:
        if quality.calibrate is not None and is_pipe(quality.calibrate):
            raise EdgekitError(
                f"{quality.calibrate}: is a pipe, which can be read once; a budget needs its text "
                "again: give a file"
            )
        text = _text(quality)
        check_tokens(source, text)
        if quality.calibrate is not None:
            read_texts(source, quality.calibrate)  # one that is too short says so before measuring
        gptq = quality.calibrate is not None and quality.method in (None, "gptq")
        mixed = mixed_recipe(source, quality.budget, schemes, text, count, progress, gptq, others)
        recipe = mixed.recipe
    check_method(quality.method, recipe)
    if quality.method is not None:
        recipe = with_ranges(recipe, "rtn" if quality.method == "rtn" else "mse")
    return recipe, mixed


def smaller_schemes(config: ModelConfig) -> dict[str, int]:
    """Return the schemes below 4 bits as a user gives them, with a model's bytes in a file."""
    shapes, tied = config.tied_shapes()
    return {
        f"`scheme` {name}": resolve(Recipe.named(name), shapes, tied).nbytes
        for name in ("cb3", "cb2")
    }


def write_codes(
    source: ModelSource,
    recipe: Recipe,
    quality: Quality,
    path: Path,
    workspace: Path,
    progress: Steps | None = None,
) -> Quantized:
    """Write the codes of a model to `path`; what is done of a calibration is kept in `workspace`.

    EdgekitError for a text that is none or too short, and for tensors that cannot be quantized.
    """
    show = progress or no_steps
    make_folder(path.parent)
    gains = None
    if quality.calibrate is not None:
        texts = read_texts(source, quality.calibrate)
        method = quality.method or default_method(recipe)
        done = quantize_calibrated(source, recipe, texts, method, path, workspace, show)
        sqnr, gains = done.sqnr, done.gains
    else:
        sqnr = _write_rounded(source, recipe, path, show)
    measured = None
    if quality.budget is not None:
        codes = CodesFile.open(path, source.config)
        measured = divergence_of(source, codes.__getitem__, _text(quality))
    return Quantized(sqnr, gains, measured)


def quantize_model(
    source: ModelSource,
    recipe: Recipe,
    quality: Quality,
    path: Path,
    progress: Steps | None = None,
) -> Quantized:
    """Do what `write_codes` does, with the workspace beside the file."""
    with workspace_of(path) as workspace:
        return write_codes(source, recipe, quality, path, workspace, progress)


def quality_text(mixed: Mixed | None, made: Quantized | None) -> list[str]:
    """Return what a budget chose and what a calibration gained, as paragraphs."""
    parts = []
    if mixed is not None:
        parts.append(f"\n{mixed.text()}")
        if made is not None and made.measured is not None:
            parts.append(f"measured KLD {made.measured.text(5)}")
    if made is not None and made.gains is not None:
        parts.append(f"\n{made.gains.text()}")
    return parts


def quality_dict(mixed: Mixed | None, made: Quantized | None) -> dict[str, Any]:
    """Return the same as JSON data."""
    found: dict[str, Any] = {}
    if mixed is not None:
        measured = None if made is None or made.measured is None else made.measured.to_dict()
        found["mixed"] = {**mixed.to_dict(), "measured_kld": measured}
    if made is not None and made.gains is not None:
        found["gains"] = made.gains.to_dict()
    return found


def _write_rounded(
    source: ModelSource, recipe: Recipe, path: Path, progress: Steps
) -> dict[str, float]:
    shapes, tied = source.config.tied_shapes()
    rows = resolve(recipe, shapes, tied)
    checkpoint = source.checkpoint
    about = About(
        short_text(source.id), checkpoint.sha256(), short_text(recipe.name), method_of(rows)
    )
    done = 0

    def count(_tensor: str) -> None:
        nonlocal done
        done += 1
        progress(done, len(rows), "quantizing")

    return quantize_to_file(rows, checkpoint.tensor, path, count, about)


def _text(quality: Quality) -> str:
    """Return the text that tensors' costs are measured on: the end, which calibrates nothing."""
    return TEXT if quality.calibrate is None else read_text(quality.calibrate)[-_END:]
