"""Model folders from the Hugging Face hub, or from its cache on this machine.

The endpoint, the cache's place, the token and offline mode are huggingface_hub's own settings
(HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). When a connection breaks, it asks for the rest
of the file by an HTTP range; a download that was ended keeps the files that were complete.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

from huggingface_hub import DryRunFileInfo, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from edgekit.common.files import sha256_of
from edgekit.common.progress import somebody_looks
from edgekit.errors import EdgekitError, Interrupted
from edgekit.models.hub_reasons import reason
from edgekit.models.kinds import repository_without_config, repository_without_weights

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NOT_TOP_LEVEL = ["*/*"]  # in these patterns `*` also matches across folders
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_FILES = ("*.safetensors", _WHOLE[1])
_SHA256 = re.compile("[0-9a-f]{64}")


def download(
    hub_id: str, revision: str | None = None, offline: bool = False, weights: bool = True
) -> Path:
    """Return a folder with the model's files, whose name is the commit they come from.

    Files already in the cache are not fetched again, and where the hub gives no answer a whole
    model in the cache will do. `offline` uses the cache alone; `weights=False` fetches the
    configuration and the tokenizer only. A failure is one line.
    """
    (enable_progress_bars if somebody_looks() else disable_progress_bars)()
    try:
        with _quietly():
            folder = _snapshot(hub_id, revision, offline, weights)
            _check_whole(hub_id, folder, offline, weights)
            return folder
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{hub_id}: download cancelled; finished files are kept for next time"
        ) from error
    except EdgekitError:
        raise
    except Exception as error:  # the HTTP library underneath, and so its errors, vary by version
        raise EdgekitError(f"{hub_id}: {reason(error, hub_id, revision)}") from error


def cached_bytes(hub_id: str) -> int | None:
    """Return the size of a model that lies complete in the local cache; None if it does not."""
    try:
        folder = _snapshot(hub_id, None, offline=True, weights=True)
    except (LocalEntryNotFoundError, OSError, ValueError):  # the last: a damaged cache
        return None
    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in files):
        return None  # a configuration alone, fetched for --random-weights
    return sum(path.stat().st_size for path in files)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what the error that follows says, in one line; a wait for the hub is told."""
    logger = logging.getLogger("huggingface_hub")
    handlers = [*logger.handlers]
    for handler in handlers:
        handler.addFilter(_is_a_wait)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_a_wait)


def _is_a_wait(record: logging.LogRecord) -> bool:
    return record.getMessage().startswith("Rate limited")


def _snapshot(hub_id: str, revision: str | None, offline: bool, weights: bool) -> Path:
    find = partial(
        snapshot_download,
        hub_id,
        revision=revision,
        allow_patterns=[*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())],
        ignore_patterns=_NOT_TOP_LEVEL,
    )
    if offline:
        return Path(find(local_files_only=True))
    try:
        files = cast("list[DryRunFileInfo]", find(dry_run=True))
    except (RevisionNotFoundError, HFValidationError):
        raise
    except Exception as answer:  # noqa: BLE001  (one of the HTTP library underneath, too)
        try:
            return Path(find(local_files_only=True))
        except LocalEntryNotFoundError:
            raise answer from answer.__cause__
    for file in files:
        # `snapshot_download` would fetch them in threads, and Ctrl-C would wait for the last
        if file.will_download:
            path = hf_hub_download(hub_id, file.filename, revision=file.commit_hash)
            _check_content(hub_id, Path(path))
    return Path(find())


def _check_whole(hub_id: str, folder: Path, offline: bool, weights: bool) -> None:
    """Say what a repository is that holds no model: the names of its files tell."""
    configured = (folder / "config.json").is_file()
    if configured and (not weights or any((folder / name).is_file() for name in _WHOLE)):
        return
    try:
        names = [] if offline else HfApi().list_repo_files(hub_id, revision=folder.name)
    except Exception:  # noqa: BLE001  (as above; then it cannot be said)
        names = []
    top = [name for name in names if "/" not in name]
    if not configured:
        raise EdgekitError(f"{hub_id}: {repository_without_config(top)}")
    if top:
        raise EdgekitError(f"{hub_id}: {repository_without_weights(hub_id, top)}")


def _check_content(hub_id: str, link: Path) -> None:
    """Refuse a file that arrived damaged, and remove it from the cache.

    The cache names a large file by the sha256 that the hub states.
    """
    blob = link.resolve()
    if _SHA256.fullmatch(blob.name) and sha256_of(blob) != blob.name:
        blob.unlink()
        link.unlink(missing_ok=True)
        raise EdgekitError(
            f"{hub_id}: {link.name} arrived damaged: its sha256 is not the one that the hub "
            "states; it is removed, try again"
        )
