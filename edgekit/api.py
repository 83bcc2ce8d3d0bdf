"""Exporting from Python: the work of `edgekit export` in one call."""

from pathlib import Path

from edgekit.artifact import Artifact
from edgekit.progress import Progress
from edgekit.quiet import quiet_imports

with quiet_imports():
    from edgekit.export import export, plan_export
    from edgekit.exporters.artifact import check_output
    from edgekit.exporters.llama_formats import find_format, format_recipe
    from edgekit.exporters.target import Options
    from edgekit.quantize.recipe import PRESETS, Recipe, preset, uniform
    from edgekit.quantize.scheme import Scheme


def export_model(
    model: str,
    output: Path | str,
    *,
    target: str = "executorch",
    recipe: Recipe | str = "int8",
    context: int | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    imatrix: Path | str | None = None,
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Artifact:
    """Export a model, verify the file in its engine, and return the artifact at `output`.

    `model` is a name of `edgekit models`, a hub id or a local folder; `recipe` a preset (int8,
    int4, float), a scheme (w8, w4g128, ...), one of llama.cpp's own formats (Q4_K_M, ...) for
    target gguf, with the file of an `imatrix` or without, or a `Recipe`; `progress` is told each
    stage.
    Raises `EdgekitError` for a mistake and `VerificationError` for a file that does not compute
    what the model computes; both leave nothing at `output`.
    """
    check_output(Path(output), force)
    form = find_format(recipe) if isinstance(recipe, str) else None
    options = Options(
        llama_format=None if form is None else form.name,
        imatrix=None if imatrix is None else Path(imatrix),
    )
    plan = plan_export(
        model,
        target,
        _recipe(recipe) if form is None else format_recipe(form),
        context,
        revision,
        random_weights=random_weights,
        options=options,
    )
    export(plan, Path(output), force, progress)
    return Artifact.open(output)


def _recipe(given: Recipe | str) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return preset(given) if given in PRESETS else uniform(Scheme.parse(given))
