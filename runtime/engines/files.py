"""What an engine's models have besides one file: weights in other files, folders of their own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from edgekit.runtime.engines.registry import ENGINES


@dataclass(frozen=True)
class ModelFolder:
    """What the description in a folder of another tool's says of the model in it."""

    path: Path
    context: int | None
    eos_ids: tuple[int, ...]


class ModelFiles(Protocol):
    """An engine's `files.py`.

    `DESCRIPTION` is the file by which its folders are known, `BELOW` the name of the folder below
    its tokenizer in which a model may be.
    """

    DESCRIPTION: str
    BELOW: str

    def weight_files(self, path: Path) -> list[Path]:
        """Return the files in which a model keeps its weights beside `path`."""
        ...

    def open_folder(self, folder: Path) -> ModelFolder:
        """Read the description; EdgekitError where it is damaged."""
        ...


def files_of(engine: str) -> ModelFiles | None:
    """Return what an engine knows of its files; None where its models are one file each."""
    return cast(ModelFiles, ENGINES.load(engine, "files")) if ENGINES.can(engine, "files") else None


def engine_of_folder(folder: Path) -> str | None:
    """Return the engine that has such folders, None where nobody does."""
    for engine in ENGINES.names("files"):
        files = files_of(engine)
        if files is not None and (folder / files.DESCRIPTION).is_file():
            return engine
    return None
