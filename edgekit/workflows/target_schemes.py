"""The recipe of an export that is asked for by its quality: of schemes that the target holds."""

from collections.abc import Mapping
from dataclasses import replace

from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Layout, Options, find_layout
from edgekit.exporters.contract.stored import stored
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource
from edgekit.quantize.recipe import Recipe, Rule, Table, resolve
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.workflows.mixed_precision import CANDIDATES, CountBytes, Mixed, least_bytes
from edgekit.workflows.quality import Quality
from edgekit.workflows.quantize import choose_recipe


def choose_for_target(
    source: ModelSource,
    target: str,
    layout: Layout,
    recipe: Recipe,
    quality: Quality,
    steps: Steps | None,
) -> tuple[Recipe, Mixed | None]:
    """Do what `choose_recipe` does, with the target's schemes and the bytes of its file."""
    return choose_recipe(
        source,
        recipe,
        quality,
        target_schemes(layout, source.config.tied_shapes()[0]),
        _counter(layout),
        steps,
        others=lambda: _other_targets(target, source.config),
    )


def target_schemes(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[Scheme]:
    """Return the schemes that a target holds natively, embedding and head included."""
    found = []
    for scheme in map(parse_scheme, CANDIDATES):
        try:
            table = resolve(Recipe((Rule(".*", scheme),)), shapes)
            layout.check_rows(table)
        except EdgekitError:
            continue
        table = replace(table, native=layout.NATIVE_SCHEMES)
        if stored(table) == table:
            found.append(scheme)
    return found


def _counter(layout: Layout) -> CountBytes:
    """Return what counts the bytes of a table in the target's file."""

    def count(table: Table) -> int:
        held = stored(replace(table, native=layout.NATIVE_SCHEMES))
        once = layout.stored_once(held)
        return sum(layout.stored_bytes(row) for row in held if row.tensor not in once)

    return count


def _other_targets(target: str, config: ModelConfig) -> dict[str, int]:
    """Return the other targets as a user gives them, with the fewest bytes a budget has there."""
    found = {}
    for name in TARGETS.names("decoder"):
        if name != target:
            other = find_layout(name, Options())
            schemes = target_schemes(other, config.tied_shapes()[0])
            found[f"`target` {name}"] = least_bytes(config, schemes, _counter(other))
    return found
