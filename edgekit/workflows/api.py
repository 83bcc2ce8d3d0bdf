"""Exporting from Python: the work of `edgekit export` in one call."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from edgekit.common.progress import Progress
from edgekit.common.quiet import quiet_imports
from edgekit.formats.artifact.read import Artifact
from edgekit.quantize.methods import Method
from edgekit.workflows.quality import Budget, Quality, check_exclusions

with quiet_imports():
    from edgekit.exporters.contract.layout import Options
    from edgekit.exporters.contract.own_formats import find_format, format_recipe
    from edgekit.formats.artifact.write import check_output
    from edgekit.quantize.recipe import Recipe
    from edgekit.workflows.export import export_plan, with_codes
    from edgekit.workflows.plan import plan_export

if TYPE_CHECKING:
    from torch import nn

    from edgekit.quantize.traced.schemes import LayerRecipe
    from edgekit.quantize.traced.trace import Inputs
    from edgekit.workflows.export_network import Data


@overload
def export(
    model: str | Path,
    output: Path | str,
    *,
    target: str = ...,
    recipe: Recipe | str | None = ...,
    codes: Path | str | None = ...,
    calibrate: Path | str | None = ...,
    method: Method | None = ...,
    bits: float | None = ...,
    target_size: int | None = ...,
    context: int | None = ...,
    revision: str | None = ...,
    adapter: Path | str | None = ...,
    random_weights: bool = ...,
    imatrix: Path | str | None = ...,
    abi: Literal["genai", "transformersjs"] = ...,
    portable: bool = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> Artifact: ...


@overload
def export(
    model: "nn.Module",
    example_inputs: "Inputs",
    output: Path | str,
    *,
    target: str = ...,
    recipe: "LayerRecipe | str | None" = ...,
    codes: Path | str | None = ...,
    calibration: "Data" = ...,
    method: str = ...,
    max_batch: int | None = ...,
    name: str | None = ...,
    force: bool = ...,
    progress: Progress = ...,
) -> Artifact: ...


def export(model: Any, *arguments: Any, **options: Any) -> Artifact:
    """Export a language model by its name or folder, or a module with its example inputs.

    `export(name, output, ...)` is `export_model`, `export(module, example_inputs, output, ...)`
    is `export_module`; see there.
    """
    if isinstance(model, str | Path):
        return export_model(str(model), *arguments, **options)
    from edgekit.workflows.export_network import export_module

    return export_module(model, *arguments, **options)


def export_model(
    model: str,
    output: Path | str,
    *,
    target: str = "executorch",
    recipe: Recipe | str | None = None,
    codes: Path | str | None = None,
    calibrate: Path | str | None = None,
    method: Method | None = None,
    bits: float | None = None,
    target_size: int | None = None,
    context: int | None = None,
    revision: str | None = None,
    adapter: Path | str | None = None,
    random_weights: bool = False,
    imatrix: Path | str | None = None,
    abi: Literal["genai", "transformersjs"] = "genai",
    portable: bool = False,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Export a model, verify the file in its engine, and return the artifact at `output`.

    `model` is a name of `edgekit models`, a hub id or a local folder; `recipe` a preset (int8,
    int4, float; int8 by default), a scheme (w8, w4g128, ...), one of llama.cpp's own formats
    (Q4_K_M, ...) for target gguf, with the file of an `imatrix` or without, or a `Recipe`; `abi`
    and `portable` are for target onnx; `progress` is told each stage.

    `calibrate` is a text by which GPTQ, or another `method`, chooses the codes; `bits` per weight
    or `target_size` in bytes, instead of a recipe, a budget for mixed precision. `codes`, instead
    of all these, is a file of `edgekit quantize`, or of `edgekit.quantize.storage.save_quantized`
    with its `about`, packed as it is. `adapter` is the folder of a LoRA adapter of PEFT's, which
    is merged into the weights; one of another model is warned of (UserWarning).

    Raises `EdgekitError` for a mistake and `VerificationError` for a file that does not compute
    what the model computes; both leave nothing at `output`.
    """
    quality = _quality(calibrate, method, bits, target_size)
    form = find_format(recipe) if isinstance(recipe, str) else None
    check_exclusions(
        quality,
        None if recipe is None else "recipe",
        form,
        codes is not None,
    )
    check_output(Path(output), force)
    recipe = "int8" if recipe is None else recipe
    options = Options(
        llama_format=form,
        imatrix=None if imatrix is None else Path(imatrix),
        abi=abi,
        portable=portable,
    )
    plan = plan_export(
        model,
        target,
        _recipe(recipe) if form is None else format_recipe(form),
        context,
        revision,
        random_weights=random_weights,
        options=options,
        codes=None if codes is None else Path(codes),
        quality=quality,
        adapter=None if adapter is None else Path(adapter),
    )
    for text in plan.source.notes():
        warnings.warn(text, stacklevel=2)
    with with_codes(plan, Path(output)) as (ready, _made):
        export_plan(ready, Path(output), force, progress)
    return Artifact.open(output)


def _quality(
    calibrate: Path | str | None,
    method: Method | None,
    bits: float | None,
    target_size: int | None,
) -> Quality:
    budget = None if (target_size, bits) == (None, None) else Budget(target_size, bits)
    return Quality(None if calibrate is None else Path(calibrate), method, budget)


def _recipe(given: Recipe | str) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return Recipe.named(given)
