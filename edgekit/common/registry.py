"""Finding a target's or an engine's module by name: a folder for each, a file for each capability.

A capability is the name of a file (`decoder`, `network`, `inspect`, ...); a folder without the file
cannot do it. Only the module that is asked for is imported, with its libraries.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from edgekit.errors import EdgekitError


@dataclass(frozen=True)
class Registry:
    """Names of one kind of thing, each with its package; `does` says what a capability is.

    `kind` is the word of messages: `target`, `engine`.
    """

    kind: str
    packages: Mapping[str, str]
    does: Mapping[str, str]

    def names(self, capability: str) -> list[str]:
        """Return the names that have a capability, in the order of the registry."""
        return [name for name in self.packages if self._module(name, capability) is not None]

    def can(self, name: str, capability: str) -> bool:
        """Whether a known name has a capability."""
        return name in self.packages and self._module(name, capability) is not None

    def load(self, name: str, capability: str) -> ModuleType:
        """Import what `find` gives; ModuleNotFoundError where a library it needs is missing."""
        return importlib.import_module(self.find(name, capability))

    def find(self, name: str, capability: str) -> str:
        """Return the module; EdgekitError for an unknown name and for one that cannot do it."""
        if name not in self.packages:
            allowed = ", ".join(self.names(capability))
            raise EdgekitError(
                f"unknown {self.kind} {name!r:.60}: allowed are {allowed}", field=self.kind
            )
        module = self._module(name, capability)
        if module is None:
            able = ", ".join(self.names(capability))
            raise EdgekitError(
                f"{self.kind} {name} cannot {self.does[capability]}; those that can: {able}",
                field=self.kind,
            )
        return module

    def _module(self, name: str, capability: str) -> str | None:
        if capability not in self.does:
            raise KeyError(f"{self.kind}s have no capability {capability!r}")
        module = f"{self.packages[name]}.{capability}"
        return module if importlib.util.find_spec(module) is not None else None
