"""Typed access to the keys of a config.json; what no model can have is refused by its key."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from edgekit.errors import EdgekitError
from edgekit.models.architecture import BandScaling, Rope

# Sanity bounds, far beyond any edge model: they keep a corrupt file from asking for terabytes.
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_LAYERS = 1024
MAX_CONTEXT = 1 << 30
MAX_PARAMETERS = 1 << 40

Scalings = Mapping[str, Callable[[str, Mapping[str, Any]], BandScaling]]
"""By rope_type what makes a scaling of a table of that name."""


class Keys:
    """Typed access to a config.json; several names of one key must agree."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def find(self, *names: str) -> tuple[str, Any]:
        """Return the name and value of the first spelling present; (first name, None) if none."""
        given = [(name, self.raw[name]) for name in names if self.raw.get(name) is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise EdgekitError(
                    f"config: {given[0][0]} {show(given[0][1])} contradicts "
                    f"{name} {show(value)}; they mean the same thing"
                )
        return given[0] if given else (names[0], None)

    def integer(self, *names: str, high: int, low: int = 1, default: int | None = None) -> int:
        """Return an integer of `low` to `high`; one without default must be there."""
        name, value = self.find(*names)
        if value is None:
            return default if default is not None else missing(*names)
        if type(value) is not int:
            raise EdgekitError(f"config: {name} must be an integer, not {show(value)}")
        check_range(name, value, low, high)
        return value

    def number(self, *names: str, default: float) -> float:
        """Return a finite number."""
        name, value = self.find(*names)
        return default if value is None else number(name, value)

    def flag(self, *names: str, default: bool) -> bool:
        """Return true or false."""
        name, value = self.find(*names)
        if value is None:
            return default
        if type(value) is not bool:
            raise EdgekitError(f"config: {name} must be true or false, not {show(value)}")
        return value


def read_rope(keys: Keys, theta: float, scalings: Scalings | None = None) -> Rope:
    """Read the rotation from any spelling; `theta` is the default, `scalings` what may slow it."""
    top, nested = keys.raw.get("rope_theta"), None
    scaling: BandScaling | None = None
    for name in ("rope_parameters", "rope_scaling"):
        table = keys.raw.get(name)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise EdgekitError(f"config: {name} must be a table, not {show(table)}")
        scaling = _scaling(name, table, scalings or {}) or scaling
        if table.get("rope_theta") is not None:
            nested = number(f"{name}.rope_theta", table["rope_theta"])
    if top is None:
        return Rope(nested if nested is not None else theta, scaling)
    stated = number("rope_theta", top)
    if nested is not None and nested != stated:
        raise EdgekitError(
            f"config: rope_theta {stated:g} contradicts rope_parameters.rope_theta {nested:g}"
        )
    return Rope(stated, scaling)


def _scaling(name: str, table: Mapping[str, Any], scalings: Scalings) -> BandScaling | None:
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise EdgekitError(f"config: {name}.partial_rotary_factor must be 1")
    found = None
    for key in ("rope_type", "type"):
        kind = table.get(key, "default")
        if kind == "default":
            continue
        if not isinstance(kind, str) or kind not in scalings:
            raise EdgekitError(
                f"config: {name}.{key} {show(kind)} is not supported; supported: "
                + ", ".join(["default", *scalings])
            )
        found = scalings[kind](name, table)
    return found


def read_head_dim(keys: Keys, hidden: int, heads: int) -> int:
    """Return the width of a head: by default the model's, shared among them."""
    if keys.raw.get("head_dim") is not None:
        return keys.integer("head_dim", high=MAX_WIDTH)
    if hidden % heads:
        raise EdgekitError(
            f"config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and head_dim is absent"
        )
    return hidden // heads


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """Read a token id that may be absent (empty), one integer, or a list of them."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < MAX_VOCAB:
            raise EdgekitError(f"config: {key} must be a token id or a list, not {show(value)}")
    return tuple(dict.fromkeys(ids))


def number(name: str, value: object) -> float:
    """Return a finite number; also NaN is refused."""
    if (
        isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300
    ):  # also refuses NaN
        raise EdgekitError(f"config: {name} must be a finite number, not {show(value)}")
    return float(value)


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Refuse an integer outside of `low` to `high`."""
    if not low <= value <= high:
        raise EdgekitError(f"config: {name} must lie between {low} and {high}, not {show(value)}")


def missing(*names: str) -> NoReturn:
    """Refuse a file that has none of some keys."""
    raise EdgekitError(f"config: {' or '.join(names)} is missing")


def show(value: object) -> str:
    """Show a value from a file on one short line, whatever it is."""
    text = "a huge integer" if isinstance(value, int) and value.bit_length() > 256 else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
