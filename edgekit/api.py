"""Exporting from Python: the work of `edgekit export` in one call."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError
from edgekit.progress import Progress
from edgekit.quiet import quiet_imports

with quiet_imports():
    from edgekit.exporters.artifact import check_output
    from edgekit.exporters.llama_formats import find_format, format_recipe
    from edgekit.exporters.target import Options
    from edgekit.model_export import export_plan, plan_export
    from edgekit.quantize.recipe import PRESETS, Recipe, preset, uniform
    from edgekit.quantize.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekit.module_export import Data
    from edgekit.quantize.traced.schemes import LayerRecipe


@overload
def export(
    model: str | Path,
    output: Path | str,
    *,
    target: str = ...,
    recipe: Recipe | str = ...,
    context: int | None = ...,
    revision: str | None = ...,
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
    example_inputs: "tuple[Tensor, ...]",
    output: Path | str,
    *,
    target: str = ...,
    recipe: "LayerRecipe | str" = ...,
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
    from edgekit.module_export import export_module

    return export_module(model, *arguments, **options)


def export_model(
    model: str,
    output: Path | str,
    *,
    target: str = "executorch",
    recipe: Recipe | str | None = None,
    codes: Path | str | None = None,
    context: int | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    imatrix: Path | str | None = None,
    abi: Literal["genai", "transformersjs"] = "genai",
    portable: bool = False,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Export a model, verify the file in its engine, and return the artifact at `output`.

    `model` is a name of `edgekit models`, a hub id or a local folder; `recipe` a preset (int8,
    int4, float; int8 by default), a scheme (w8, w4g128, ...), one of llama.cpp's own formats (Q4_K_M, ...) for
    target gguf, with the file of an `imatrix` or without, or a `Recipe`; `abi` and `portable` are
    for target onnx; `codes`, instead of a recipe, is a file of `edgekit quantize` or of
    `save_quantized`, whose codes are packed as they are; `progress` is told each stage.
    Raises `EdgekitError` for a mistake and `VerificationError` for a file that does not compute
    what the model computes; both leave nothing at `output`.
    """
    if codes is not None and recipe is not None:
        raise EdgekitError(
            "codes and recipe exclude each other: the file's tensors are what they are"
        )
    check_output(Path(output), force)
    recipe = "int8" if recipe is None else recipe
    form = find_format(recipe) if isinstance(recipe, str) else None
    options = Options(
        llama_format=None if form is None else form.name,
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
    )
    export_plan(plan, Path(output), force, progress)
    return Artifact.open(output)


def _recipe(given: Recipe | str) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return preset(given) if given in PRESETS else uniform(Scheme.parse(given))
