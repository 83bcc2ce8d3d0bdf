"""What a module returns: the names of its tensors, and what is the same in every call."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_unflatten

from edgekit.errors import EdgekitError

Constant = int | float | bool | str | None
_ILLEGAL = re.compile(r"[^\w.+-]", re.ASCII)


@dataclass(frozen=True)
class Results:
    """The results of a module by their place in what it returns.

    names      of the tensors, in order: keys and fields, and indices after a dot
               (`scores`, `boxes.0`); `output_0` and so on where the outermost place is an index
    constants  numbers, texts and None that it returns beside them, by their names
    """

    names: tuple[str, ...]
    constants: dict[str, Constant]
    _structure: TreeSpec
    _leaves: tuple[str, ...]

    @classmethod
    def of(
        cls,
        module: str,
        structure: TreeSpec,
        leaves: Sequence[object],
        taken: Sequence[str],
    ) -> "Results":
        """Name the leaves of what a module returns; `taken` are the names of its inputs.

        EdgekitError where it returns no tensor, or what is neither tensor nor plain value.
        """
        names = _unique(_places(structure), taken)
        tensors, constants = [], {}
        for name, leaf in zip(names, leaves, strict=True):
            if isinstance(leaf, Node):
                tensors.append(name)
            else:
                constants[name] = _checked(f"{module}: result {name!r}", leaf)
        if not tensors:
            raise EdgekitError(f"{module} returns no tensor: it must return one at least")
        return cls(tuple(tensors), constants, structure, tuple(names))

    def structured(self, tensors: Sequence[object]) -> Any:  # noqa: ANN401 - as the module's
        """Return tensors, one for each name, in the form in which the module returns them."""
        found = {**dict(zip(self.names, tensors, strict=True)), **self.constants}
        return tree_unflatten([found[name] for name in self._leaves], self._structure)


def _checked(name: str, value: object) -> Constant:
    if isinstance(value, float) and not math.isfinite(value):
        raise EdgekitError(f"{name} is {value}: a number beside tensors must be finite")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise EdgekitError(
        f"{name} is a {type(value).__name__}: a module may return tensors, numbers, texts and "
        "None, in tuples, lists, dicts and what torch.export knows beside them"
    )


def _places(structure: TreeSpec) -> list[str]:
    """Return the path to each leaf."""
    return [
        "output_0" if not path else f"output_{path}" if path[0].isdecimal() else path
        for path in (".".join(map(_legal, each)) for each in _paths(structure))
    ]


def _paths(structure: TreeSpec) -> list[tuple[str, ...]]:
    if structure.is_leaf():
        return [()]
    children = structure.children()
    keys = _keys(structure, len(children))
    return [
        (key, *rest) for key, child in zip(keys, children, strict=True) for rest in _paths(child)
    ]


def _keys(structure: TreeSpec, count: int) -> list[str]:
    """Return what the children are called: keys of a mapping, fields of a record, or indices."""
    context = structure.context
    fields = getattr(context, "_fields", None)  # of a named tuple the context is its class
    # A dataclass has its fields beside those that are None, a defaultdict its keys behind
    # what makes its values.
    candidates = (
        [fields, context, *context] if isinstance(context, list | tuple) else [fields, context]
    )
    for found in candidates:
        if isinstance(found, list | tuple) and len(found) == count and _are_keys(found):
            return [str(key) for key in found]
    return [str(number) for number in range(count)]


def _are_keys(found: Sequence[object]) -> bool:
    return all(isinstance(key, str | int) for key in found)


def _legal(key: str) -> str:
    return _ILLEGAL.sub("_", key) or "_"


def _unique(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Tell apart names that are equal, to each other or to an input's, as files need."""
    used, found = set(taken), []
    for name in names:
        number, new = 2, f"output_{name}" if name in taken else name
        base = new
        while new in used:
            new, number = f"{base}_{number}", number + 1
        used.add(new)
        found.append(new)
    return found
