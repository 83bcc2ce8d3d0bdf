"""Entries of a JSON object, each taken with its type; EdgekitError names the one that is wrong."""

from collections.abc import Mapping
from typing import Any, TypeVar

from edgekit.errors import EdgekitError

_MAX_DIMS = 8
_MAX_SIZE = 1 << 48
_JSON_NAMES = {int: "an integer", dict: "an object", list: "a list", str: "a string"}
T = TypeVar("T")


def take(holder: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    """Return an entry of that type; `where` stands before the key in the error."""
    value = holder.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise EdgekitError(f"{where}{key} must be {_JSON_NAMES[kind]}, got {value!r:.60}")
    return value


def optional(holder: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T | None:
    """Return an entry of that type, None where it is null or absent."""
    return None if holder.get(key) is None else take(holder, key, kind, where)


def texts(holder: Mapping[str, Any], key: str) -> dict[str, str]:
    """Return an entry that is an object of strings."""
    found = take(holder, key, dict)
    for name in found:
        take(found, name, str, f"{key}: ")
    return found


def is_shape(value: object) -> bool:
    """Whether it is the shape of a tensor that could be."""
    return isinstance(value, list) and 1 <= len(value) <= _MAX_DIMS and all(map(is_count, value))


def is_count(value: object) -> bool:
    """Whether it is a size above 0."""
    return is_size(value) and value != 0


def is_size(value: object) -> bool:
    """Whether it is a size, of bytes or of an axis."""
    return type(value) is int and 0 <= value < _MAX_SIZE


def without_none(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not known."""
    return {key: value for key, value in facts.items() if value is not None}
