"""Mixed precision: a scheme for each matrix, so that all fit a budget and cost the least.

What a tensor costs at a scheme is its measured divergence (`edgekit.sensitivity`); costs are taken
to add up. Where GPTQ will choose the codes of the layers, theirs count `LEFT_BY_GPTQ` times. The
choice starts from the fewest bytes and takes, step by step, the change that saves the most
divergence for a byte, as long as it fits (the greedy rule for the multiple-choice knapsack). The
whole model is then measured: costs do not quite add up.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.models.source import ModelSource
from edgekit.progress import Steps, no_steps
from edgekit.quality import Budget
from edgekit.quantize.recipe import Recipe, Resolved, Rule, in_layers, resolve, tied_shapes
from edgekit.quantize.scheme import Scheme
from edgekit.quantize.table import total_bytes
from edgekit.sensitivity import sensitivities
from edgekit.tables import markdown_table

CANDIDATES = ("w4g64", "w4g32", "w4g32a", "w5g32", "w6g16", "w8g32", "w8")
"""The schemes that are tried, those that a target can hold; without a target `EVERYWHERE`."""
EVERYWHERE = ("w4g64", "w4g32", "w8")

LEFT_BY_GPTQ = 0.36
"""The share of the divergence of rounding, with ranges of least squared error, that GPTQ leaves.

Measured on lfm2-tiny at `--int4` (README, Quantize). The embedding and the head are rounded to
nearest whatever happens, so without it too few of the bytes go to them: at 5.08 bits per weight in
a GGUF the mean divergence was 0.0068 without and is 0.0062.
"""

CountBytes = Callable[[Sequence[Resolved], Mapping[str, str]], int]


@dataclass(frozen=True)
class Mixed:
    """A recipe that gives each matrix its scheme, its bytes, and the sum of the costs.

    `choices` holds tensor, scheme and cost; a tied head's cost, None, is in the embedding's.
    """

    recipe: Recipe
    bytes: int
    bits: float
    predicted_kld: float
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
        rows = [
            [name, scheme, "tied" if kld is None else f"{kld:.6f}"]
            for name, scheme, kld in self.choices
        ]
        return (
            f"{markdown_table(['tensor', 'scheme', 'KLD alone'], rows, align='llr')}\n"
            f"{self.bytes:,} bytes, {self.bits:.3f} bits per weight, predicted KLD "
            f"{self.predicted_kld:.5f}"
        )


@dataclass(frozen=True, eq=False)
class _Item:
    """Tensors that get one scheme: a matrix, or an embedding and the head that is tied to it.

    `costs` are the divergences by scheme.
    """

    tensors: tuple[str, ...]
    costs: Mapping[str, float]


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
    count: CountBytes = total_bytes,
    progress: Steps | None = None,
    gptq: bool = False,
) -> Mixed:
    """Choose a scheme for each matrix; what is no matrix stays float.

    `count` gives the bytes of a table, `gptq` says that GPTQ will choose the codes. EdgekitError
    where the budget is below what the schemes can do, naming the least and the most.
    """
    shapes, tied = tied_shapes(source.config.tensor_shapes())
    schemes = [scheme for scheme in schemes if _holds(scheme, shapes)]
    items = _items(source, schemes, tied, text, progress or no_steps)
    if gptq:
        items = [_with_gptq(item) for item in items]
    parameters = source.config.parameter_count

    def size(chosen: Mapping[_Item, str]) -> int:
        return count(resolve(_recipe(chosen, budget), shapes), tied)

    def one_size(item: _Item, scheme: str) -> int:
        tensors = {name: shapes[name] for name in item.tensors}
        rules = tuple(Rule(re.escape(name), Scheme.parse(scheme)) for name in tensors)
        return count(resolve(Recipe(rules), tensors), tied)

    sizes = {
        (item, scheme.name): one_size(item, scheme.name) for item in items for scheme in schemes
    }
    chosen = {item: min(item.costs, key=lambda name: sizes[item, name]) for item in items}
    most = {item: max(item.costs, key=lambda name: sizes[item, name]) for item in items}
    allowed, least = budget.of(parameters), size(chosen)
    if allowed < least:
        raise EdgekitError(_too_small(budget, least, size(most), parameters))
    _spend(chosen, sizes, allowed - least)
    total = size(chosen)
    choices = tuple(
        (name, scheme, item.costs[scheme] if place == 0 else None)
        for item, scheme in chosen.items()
        for place, name in enumerate(item.tensors)
    )
    predicted = sum(item.costs[scheme] for item, scheme in chosen.items())
    recipe = _recipe(chosen, budget)
    return Mixed(recipe, total, 8 * total / parameters, predicted, choices)


def _items(
    source: ModelSource,
    schemes: Sequence[Scheme],
    tied: Mapping[str, str],
    text: str,
    progress: Steps,
) -> list[_Item]:
    costs: dict[str, dict[str, float]] = {}
    for found in sensitivities(source, schemes, text, lambda scheme: _named(progress, scheme.name)):
        for cost in found.costs:
            costs.setdefault(cost.tensor, {})[found.scheme] = cost.kld
    order = [name for name in tied_shapes(source.config.tensor_shapes())[0] if name in costs]
    items = []
    for name in order:
        if name in tied:
            continue
        sharing = [other for other, first in tied.items() if first == name]
        total = {
            scheme: cost + sum(costs[other][scheme] for other in sharing)
            for scheme, cost in costs[name].items()
        }
        items.append(_Item((name, *sharing), total))
    return items


def _with_gptq(item: _Item) -> _Item:
    if not in_layers(item.tensors[0]):
        return item
    return _Item(item.tensors, {name: LEFT_BY_GPTQ * cost for name, cost in item.costs.items()})


def _spend(chosen: dict[_Item, str], sizes: Mapping[tuple[_Item, str], int], left: int) -> None:
    """Change schemes for the better until nothing fits that helps."""
    while True:
        best: tuple[float, _Item, str, int] | None = None
        for item, now in chosen.items():
            for scheme, cost in item.costs.items():
                more = sizes[item, scheme] - sizes[item, now]
                saved = item.costs[now] - cost
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
        Rule(re.escape(name), Scheme.parse(scheme))
        for item, scheme in chosen.items()
        for name in item.tensors
    ]
    return Recipe(tuple(rules), name=f"mixed-{budget.label}")


def _too_small(budget: Budget, least: int, most: int, parameters: int) -> str:
    if budget.bytes is None:
        low, high = (f"{8 * size / parameters:.3f} bits per weight" for size in (least, most))
    else:
        low, high = (f"{size:,} bytes" for size in (least, most))
    return f"{budget.option}: all tensors together take at least {low}, and at most {high}"


def _named(progress: Steps, scheme: str) -> Steps:
    return lambda done, total, label: progress(done, total, f"sensitivity at {scheme}: {label}")
