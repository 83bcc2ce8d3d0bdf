"""Writing an artifact folder: a model file, its tokenizer, `edgekit.json`; complete or absent."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit.common.files import (
    abandoned,
    check_parent,
    new_file,
    not_written,
    sha256_of,
    unfinished,
)
from edgekit.errors import EdgekitError
from edgekit.formats.artifact.manifest import Manifest
from edgekit.formats.artifact.parts import FileFacts
from edgekit.formats.artifact.read import MANIFEST, Artifact

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

_REPLACED = ".old"


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `edgekit.json` with the size and sha256 of every file beside it; return it so."""
    files = {
        file.relative_to(folder).as_posix(): FileFacts(file.stat().st_size, sha256_of(file))
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    written = replace(manifest, files=files)
    (folder / MANIFEST).write_text(_json(written))
    return written


def record_verification(artifact: Artifact, figures: Mapping[str, Any]) -> Manifest:
    """Replace the figures in an artifact's manifest in one rename; return the whole of it."""
    recorded = replace(artifact.manifest, verification=figures)
    with new_file(artifact.folder / MANIFEST) as file:
        file.write_text(_json(recorded))
    return recorded


def _json(manifest: Manifest) -> str:
    return json.dumps(manifest.to_json(), indent=1, allow_nan=False) + "\n"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files that the model has."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def check_output(output: Path, force: bool) -> None:
    """Refuse, before any work, an output folder that must not or cannot be written."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise EdgekitError(f"{output}: exists and is no folder; give another `output`")
    if output.is_dir():
        if not force:
            raise EdgekitError(
                f"{output}: exists; give `force` to replace it or another `output`", field="output"
            )
        if any(output.iterdir()) and not (output / MANIFEST).is_file():
            raise EdgekitError(
                f"{output}: is no edgekit artifact, so `force` does not replace it", field="output"
            )
    check_parent(output)


@contextmanager
def new_artifact(output: Path, force: bool) -> Iterator[Path]:
    """Give a hidden folder to fill; it becomes `output` in one rename, or nothing is left.

    `check_output` comes before; it is asked again at the rename, for what appeared meanwhile.
    A killed process leaves at most the hidden folder, which the next export to the same place
    removes.
    """
    output = output.absolute()
    if _remove_abandoned(output):
        check_output(output, force)
    with unfinished(output) as staging:
        try:
            staging.mkdir()
            yield staging
            check_output(output, force)
            _move_into_place(staging, output)
        except OSError as error:
            raise not_written(output, error) from error


def _move_into_place(staging: Path, output: Path) -> None:
    replaced = output.with_name(f"{staging.name}{_REPLACED}")
    if output.exists():
        output.rename(replaced)
    try:
        staging.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_abandoned(output: Path) -> bool:
    """Remove what killed exports to the same place left; put back what they replaced.

    Returns whether `output` is there again.
    """
    restored = False
    for folder in abandoned(output):
        if folder.name.endswith(_REPLACED) and not output.exists():
            folder.rename(output)  # killed between its two renames
            restored = True
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return restored
