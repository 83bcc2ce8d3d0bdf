"""What a module's file computes on integers and what in float, in one run of it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edgekit.exporters.inspect.tables import count_table


@dataclass(frozen=True)
class Arithmetic:
    """Layers, which multiply by weights, and other operators, by the numbers they work on.

    `float_layers` and `other_float` count by the engine's name; what changes between codes and
    floats, and what only views, is in neither.
    """

    integer_layers: int
    float_layers: dict[str, int]
    other_float: dict[str, int]

    @classmethod
    def of(
        cls, operators: Iterable[tuple[str, bool]], layers: frozenset[str], moves: frozenset[str]
    ) -> "Arithmetic":
        """Count operators, each a name and whether its result is float."""
        integers, floats, others = 0, Counter[str](), Counter[str]()
        for name, is_float in operators:
            if name in layers:
                integers += not is_float
                floats[name] += is_float
            elif is_float and name not in moves:
                others[name] += 1
        return cls(integers, dict(+floats), dict(others.most_common()))

    def text(self) -> list[str]:
        """Return a sentence on the layers, and a table of what else is float."""
        floats = ", ".join(f"{count} {name}" for name, count in self.float_layers.items())
        parts = [f"layers as run: {self.integer_layers} on integers, {floats or 'none'} in float"]
        if self.other_float:
            parts.append(count_table("other operators in float", "calls", self.other_float))
        return parts
