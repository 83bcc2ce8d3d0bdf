"""Engines for exported modules: float arrays in, float arrays out."""

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray

from edgekit.common.last_words import NO_ENGINE, engine_at_work, engine_opens, engine_works
from edgekit.errors import EdgekitError
from edgekit.runtime.engines.engine import EngineMissing
from edgekit.runtime.engines.first_load import check_first_load
from edgekit.runtime.engines.registry import ENGINES

Array = NDArray[Any]


class ModuleEngine(AbstractContextManager["ModuleEngine", None], Protocol):
    """One loaded module; a `with` block closes it.

    `name` and `version` are the engine's, `threads` is how many CPU threads it uses.
    """

    name: str
    version: str
    threads: int

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the module on its inputs, in order; outputs are the caller's own.

        EdgekitError where the engine refuses their number, types or shapes.
        """
        ...

    def close(self) -> None:
        """Release the module."""
        ...


class OneNetworkEngine:
    """What the engines share: a `with` block, and the word that this one computes."""

    def __init__(self) -> None:
        """Note which engine this is."""
        self._number = engine_at_work()

    def _laid_out(self, inputs: Sequence[Array]) -> list[Array]:
        """Return the inputs laid out as engines read them, which begin to now."""
        engine_works(self._number)
        return [np.ascontiguousarray(item) for item in inputs]

    def close(self) -> None:
        """Release the module."""

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the module."""
        self.close()
        engine_works(NO_ENGINE)


def load_module(target: str, path: Path | str, threads: int | None = None) -> ModuleEngine:
    """Open a module's file in the target's engine; `threads` None is the engine's choice.

    `path` is the engine's file, an artifact's `model_path`.
    """
    path = Path(path)
    if path.is_dir():
        raise EdgekitError(f"{path}: is a folder: give Artifact.open(folder).model_path")
    module = import_module_engine(target)
    engine_opens(target, path)
    return cast(ModuleEngine, module.open_module(path, threads))


def import_module_engine(target: str) -> ModuleType:
    """Import a target's engine: `open_module(path, threads) -> ModuleEngine`.

    EdgekitError for a target whose engine runs no modules; EngineMissing where its runtime is not
    installed.
    """
    module = ENGINES.find(target, "network")
    check_first_load(target)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise EngineMissing(f"the {target} engine needs {error.name}") from error
