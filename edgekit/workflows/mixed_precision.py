"""Mixed precision: a scheme for each matrix, so that all fit a budget and cost the least.

What a tensor costs at a scheme is its measured divergence (`sensitivity.py`); costs are taken
to add up. Where GPTQ will choose the codes of the layers, theirs count `LEFT_BY_GPTQ` times. The
choice starts from the fewest bytes and takes, step by step, the change that saves the most
divergence for a byte, as long as it fits (the greedy rule for the multiple-choice knapsack). The
whole model is then measured: costs do not quite add up.

Bytes follow from shapes alone: a budget below the least is refused before anything is measured, and
for one above the most nothing has to be.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.common.progress import Steps, no_steps
from edgekit.common.tables import markdown_table
from edgekit.errors import EdgekitError
from edgekit.models.config import ModelConfig
from edgekit.models.source import ModelSource
from edgekit.quantize.recipe import Recipe, Rule, Table, in_layers, resolve
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.workflows.quality import Budget
from edgekit.workflows.sensitivity import sensitivities

CANDIDATES = ("w4g64", "w4g32", "w4g32a", "w5g32", "w6g16", "w8g32", "w8")
"""The schemes that are tried, those that a target can hold; without a target `EVERYWHERE`."""
EVERYWHERE = ("w4g64", "w4g32", "w8")

LEFT_BY_GPTQ = 0.36
"""The share of the divergence of rounding, with ranges of least squared error, that GPTQ leaves.

Measured on lfm2-tiny at `--int4` (docs/quantize.md). The embedding and the head are rounded to
nearest whatever happens, so without it too few of the bytes go to them: at 5.08 bits per weight in
a GGUF the mean divergence was 0.0068 without and is 0.0062.
"""

CountBytes = Callable[[Table], int]


def table_bytes(table: Table) -> int:
    """Return the bytes of a table in a file of codes."""
    return table.nbytes


@dataclass(frozen=True)
class Mixed:
    """A recipe that gives each matrix its scheme, its bytes, and the sum of the costs.

    `choices` holds tensor, scheme and cost; a tied head's cost, None, is in the embedding's. All
    costs and their sum are None where the budget holds the most that there is.
    """

    recipe: Recipe
    bytes: int
    bits: float
    predicted_kld: float | None
    choices: tuple[tuple[str, str, float | None], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as JSON data."""
        return {
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "predicted_kld": self.predicted_kld,
            "choices": [
                {"tensor": name, "scheme": scheme, "kld": kld} for name, scheme, kld in self.choices
            ],
        }

    def text(self) -> str:
        """Return the choices as a table."""
        size = f"{self.bytes:,} bytes, {self.bits:.3f} bits per weight"
        if self.predicted_kld is None:
            return f"{size}: the budget holds the most for every matrix, so none was measured alone"
        rows = [
            [name, scheme, "tied" if kld is None else f"{kld:.6f}"]
            for name, scheme, kld in self.choices
        ]
        return (
            f"{markdown_table(['tensor', 'scheme', 'KLD alone'], rows, align='llr')}\n"
            f"{size}, predicted KLD {self.predicted_kld:.5f}"
        )


@dataclass(frozen=True)
class _Item:
    """Tensors that get one scheme: a matrix, or an embedding and the head that is tied to it."""

    tensors: tuple[str, ...]


_Sizes = Mapping[tuple[_Item, str], int]
"""Bytes of an item at a scheme."""
_Costs = Mapping[_Item, Mapping[str, float]]
"""Divergences by scheme."""


def _holds(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether every matrix can have the scheme's groups."""
    try:
        for shape in shapes.values():
            if len(shape) == 2:
                scheme.check_shape(shape)
    except ValueError:
        return False
    return True


def mixed_recipe(
    source: ModelSource,
    budget: Budget,
    schemes: Sequence[Scheme],
    text: str,
    count: CountBytes = table_bytes,
    progress: Steps | None = None,
    gptq: bool = False,
    others: Callable[[], Mapping[str, int]] = dict,
) -> Mixed:
    """Choose a scheme for each matrix; what is no matrix stays float.

    `count` gives the bytes of a table, `gptq` says that GPTQ will choose the codes. EdgekitError
    where the budget is below what the schemes can do, naming the least and the most, and of
    `others`, what a user may ask for instead with its bytes, what comes nearest.
    """
    shapes, tied = source.config.tied_shapes()
    schemes = [scheme for scheme in schemes if _holds(scheme, shapes)]
    items = _items(shapes, tied)
    parameters = source.config.parameter_count

    def size(chosen: Mapping[_Item, str]) -> int:
        return count(resolve(_recipe(chosen, budget), shapes, tied))

    def one_size(item: _Item, scheme: str) -> int:
        tensors = {name: shapes[name] for name in item.tensors}
        rules = tuple(Rule(re.escape(name), parse_scheme(scheme)) for name in tensors)
        return count(resolve(Recipe(rules), tensors, tied))

    names = [scheme.name for scheme in schemes]
    sizes = {(item, name): one_size(item, name) for item in items for name in names}
    chosen = {item: min(names, key=lambda name: sizes[item, name]) for item in items}
    largest = {item: max(names, key=lambda name: sizes[item, name]) for item in items}
    allowed, least, most = budget.of(parameters), size(chosen), size(largest)
    if allowed < least:
        raise EdgekitError(_too_small(budget, least, most, others(), parameters))
    costs: _Costs | None = None
    if allowed < most:
        costs = _measured(source, schemes, items, text, progress or no_steps, gptq)
        _spend(chosen, costs, sizes, allowed - least)
    else:
        chosen = largest
    total = size(chosen)
    choices = tuple(
        (name, scheme, costs[item][scheme] if costs is not None and place == 0 else None)
        for item, scheme in chosen.items()
        for place, name in enumerate(item.tensors)
    )
    predicted = (
        None if costs is None else sum(costs[item][scheme] for item, scheme in chosen.items())
    )
    return Mixed(_recipe(chosen, budget), total, 8 * total / parameters, predicted, choices)


def _items(shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]) -> list[_Item]:
    """Return the matrices in order, a tied one with the one that it is tied to."""
    return [
        _Item((name, *(other for other, first in tied.items() if first == name)))
        for name, shape in shapes.items()
        if len(shape) == 2 and name not in tied
    ]


def _measured(
    source: ModelSource,
    schemes: Sequence[Scheme],
    items: Sequence[_Item],
    text: str,
    progress: Steps,
    gptq: bool,
) -> _Costs:
    costs: dict[str, dict[str, float]] = {}
    for found in sensitivities(source, schemes, text, lambda scheme: _named(progress, scheme.name)):
        for cost in found.costs:
            costs.setdefault(cost.tensor, {})[found.scheme] = cost.kld

    def left(item: _Item) -> float:
        return LEFT_BY_GPTQ if gptq and in_layers(item.tensors[0]) else 1.0

    return {
        item: {
            scheme.name: left(item) * sum(costs[name][scheme.name] for name in item.tensors)
            for scheme in schemes
        }
        for item in items
    }


def _spend(chosen: dict[_Item, str], costs: _Costs, sizes: _Sizes, left: int) -> None:
    """Change schemes for the better until nothing fits that helps."""
    while True:
        best: tuple[float, _Item, str, int] | None = None
        for item, now in chosen.items():
            for scheme, cost in costs[item].items():
                more = sizes[item, scheme] - sizes[item, now]
                saved = costs[item][now] - cost
                # Where both cost as many bytes the better one is free.
                if saved <= 0 or more > left:
                    continue
                rate = saved / more if more > 0 else math.inf
                if best is None or rate > best[0]:
                    best = rate, item, scheme, more
        if best is None:
            return
        _, item, scheme, more = best
        chosen[item] = scheme
        left -= more


def _recipe(chosen: Mapping[_Item, str], budget: Budget) -> Recipe:
    rules = [
        Rule(re.escape(name), parse_scheme(scheme))
        for item, scheme in chosen.items()
        for name in item.tensors
    ]
    return Recipe(tuple(rules), name=f"mixed-{budget.label}")


def least_bytes(config: ModelConfig, schemes: Sequence[Scheme], count: CountBytes) -> int:
    """Return the fewest bytes of all tensors of a model, head included, with some schemes."""
    shapes, tied = config.tied_shapes()

    def size(name: str, scheme: Scheme) -> int:
        row = resolve(Recipe((Rule(re.escape(name), scheme),)), {name: shapes[name]})
        return count(row)

    recipe = Recipe(
        tuple(
            Rule(re.escape(name), min(schemes, key=lambda scheme: size(name, scheme)))
            for name, shape in shapes.items()
            if len(shape) == 2
        )
    )
    return count(resolve(recipe, shapes, tied))


def _too_small(
    budget: Budget, least: int, most: int, others: Mapping[str, int], parameters: int
) -> str:
    def amount(size: int) -> str:
        bits = f"{8 * size / parameters:.3f} bits per weight"
        return bits if budget.bytes is None else f"{size:,} bytes"

    text = (
        f"{budget.option}: all tensors together take at least {amount(least)}, and at most "
        f"{amount(most)}"
    )
    smaller = {name: size for name, size in others.items() if size < least}
    fitting = {name: size for name, size in smaller.items() if size <= budget.of(parameters)}
    if fitting:
        name = max(fitting, key=lambda name: fitting[name])
        return f"{text}; {name} takes {amount(fitting[name])}"
    if smaller:
        name = min(smaller, key=lambda name: smaller[name])
        return f"{text}; even {name} takes {amount(smaller[name])}: give more, or a smaller model"
    return f"{text}: give more, or a smaller model"


def _named(progress: Steps, scheme: str) -> Steps:
    return lambda done, total, label: progress(done, total, f"sensitivity at {scheme}: {label}")
