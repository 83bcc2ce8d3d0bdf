"""Schemes and recipes of traced modules: the whitepaper's table, by name.

| name                 | arXiv 1806.08342, section 3      |
|----------------------|----------------------------------|
| `w8a8`               | per channel, symmetric weights   |
| `w8a8-affine`        | per channel, asymmetric weights  |
| `w8a8-tensor`        | per layer, symmetric weights     |
| `w8a8-tensor-affine` | per layer, asymmetric weights    |

Activations are affine, per layer, with 8 bits in all of them; `w4a8` and its kin have weights of
4 bits. An embedding takes the weight's part: indices have no range. `float` leaves a layer as it
is. A recipe gives each layer the scheme of the first rule that matches its weight's whole name;
what no rule matches stays float.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from edgekit.common.limits import TooCostly, bounded
from edgekit.errors import EdgekitError
from edgekit.quantize.affine import quantize
from edgekit.quantize.grid import Grid
from edgekit.quantize.methods import RangeMethod
from edgekit.quantize.recipe import check_rule, load_rules
from edgekit.quantize.schemes.names import STATIC
from edgekit.quantize.tensor import QuantizedTensor

FORMS = "float, w8a8 and w4a8, each also with -affine, -tensor or -tensor-affine"


@dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized; its activations have 8 bits.

    bits         of the weight: 8, 4, or None for a layer that stays float
    granularity  one weight scale per output channel or for the whole tensor
    symmetric    weights without zero points
    """

    bits: Literal[4, 8] | None = 8
    granularity: Literal["channel", "tensor"] = "channel"
    symmetric: bool = True

    @classmethod
    def parse(cls, name: str) -> "LayerScheme":
        """Return the scheme of a name; EdgekitError with the allowed forms for any other."""
        if name == "float":
            return cls(bits=None)
        match = STATIC.fullmatch(name)
        if match is None:
            raise EdgekitError(f"unknown scheme {name!r:.60}: allowed are {FORMS}")
        return cls(4 if match[1] == "4" else 8, "tensor" if match[2] else "channel", not match[3])

    @staticmethod
    def has_name(name: str) -> bool:
        """Whether a name is that of a scheme with static ranges."""
        return STATIC.fullmatch(name) is not None

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        if self.bits is None:
            return "float"
        granularity = "-tensor" if self.granularity == "tensor" else ""
        return f"w{self.bits}a8{granularity}{'' if self.symmetric else '-affine'}"

    @property
    def is_float(self) -> bool:
        """True where nothing is quantized."""
        return self.bits is None

    @property
    def default_range(self) -> RangeMethod:
        """As in `Scheme`: least squared error at 4 bits, minimum and maximum at 8."""
        return "mse" if self.bits == 4 else "minmax"

    @property
    def grid(self) -> Grid:
        """The codes of the weight; ValueError for the float scheme."""
        if self.bits is None:
            raise ValueError("the float scheme has no codes")
        return Grid(self.bits, self.symmetric, restricted=self.symmetric and self.bits == 8)

    def axis(self, channel_axis: int) -> int | None:
        """Return the axis that has a scale per entry, None where the tensor has one scale."""
        return channel_axis if self.granularity == "channel" else None

    def quantize(
        self, weight: Tensor, channel_axis: int, method: RangeMethod | None = None
    ) -> QuantizedTensor:
        """Return the codes of a weight: [-127, 127] or [-8, 7] if symmetric, else from 0.

        ValueError for the float scheme and for a weight that holds infinities or NaN.
        """
        return quantize(
            weight,
            self.grid,
            axis=self.axis(channel_axis),
            method=method or self.default_range,
        )


@dataclass(frozen=True)
class LayerRule:
    """Layers whose weight's name matches `pattern` get `scheme`; `range` None: its default."""

    pattern: str
    scheme: LayerScheme
    range: RangeMethod | None = None

    def __post_init__(self) -> None:
        """Refuse expressions that do not compile and ranges that do not exist."""
        check_rule(self.pattern, self.range, self.scheme.is_float)


@dataclass(frozen=True)
class LayerRecipe:
    """Ordered rules; `name` is what messages call it."""

    rules: tuple[LayerRule, ...]
    name: str = "recipe"

    @classmethod
    def uniform(cls, scheme: str) -> "LayerRecipe":
        """Return the recipe that gives every layer one scheme, by its name.

        For float that is no rule, so that a module without layers is one that it takes.
        """
        if LayerScheme.parse(scheme).is_float:
            return cls((), name=scheme)
        return cls((LayerRule(".*", LayerScheme.parse(scheme)),), name=scheme)

    @classmethod
    def load(cls, path: Path) -> "LayerRecipe":
        """Read a .toml or .json recipe, written as those of `Recipe`."""
        return cls(
            load_rules(
                path, lambda *entry: LayerRule(entry[0], LayerScheme.parse(entry[1]), entry[2])
            ),
            name=path.name,
        )

    def resolve(self, weights: Sequence[str]) -> dict[str, LayerRule]:
        """Return each layer's rule by its weight's name; those that no rule matches are left out.

        Raises EdgekitError for a rule that takes no layer, and where the patterns take seconds.
        """
        try:
            with bounded():
                found = {name: self._first(name) for name in weights}
        except TooCostly as error:
            raise EdgekitError(
                f"{self.name}: matching its patterns {error}: simplify those with repeats in "
                "repeats"
            ) from error
        for number, rule in enumerate(self.rules, start=1):
            if rule not in found.values():
                example = weights[0] if weights else "none, the module has no layers"
                raise EdgekitError(
                    f"{self.name}: rule {number}: pattern {rule.pattern!r:.200} takes no layer, or "
                    f"earlier rules take all it matches (a weight is, for example, {example})"
                )
        return {name: rule for name, rule in found.items() if rule is not None}

    def _first(self, weight: str) -> LayerRule | None:
        matching = (rule for rule in self.rules if re.fullmatch(rule.pattern, weight))
        return next(matching, None)
