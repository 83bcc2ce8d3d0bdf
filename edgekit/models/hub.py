"""Model folders from the Hugging Face hub, or from its cache on this machine.

The endpoint, the cache's place, the token and offline mode are huggingface_hub's own settings
(HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE). When a connection breaks, it asks for the rest
of the file by an HTTP range; a download that was ended keeps the files that were complete.
"""

import errno
import warnings
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from edgekit.errors import EdgekitError, Interrupted, one_line
from edgekit.progress import somebody_looks

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_NOT_TOP_LEVEL = ["*/*"]  # in these patterns `*` also matches across folders
_WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")


def download(
    hub_id: str, revision: str | None = None, offline: bool = False, weights: bool = True
) -> Path:
    """Return a folder with the model's files, whose name is the commit they come from.

    Files already in the cache are not fetched again. `offline` uses the cache alone;
    `weights=False` fetches the configuration and the tokenizer only. A failure is one line.
    """
    (enable_progress_bars if somebody_looks() else disable_progress_bars)()
    try:
        with warnings.catch_warnings():
            # the error that follows says it, in one line
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            return _snapshot(hub_id, revision, offline, weights)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{hub_id}: download cancelled; finished files are kept for next time"
        ) from error
    except Exception as error:  # the HTTP library underneath, and so its errors, vary by version
        raise EdgekitError(f"{hub_id}: {_reason(error, hub_id, revision)}") from error


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


def _snapshot(hub_id: str, revision: str | None, offline: bool, weights: bool) -> Path:
    wanted = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())]
    if not offline:
        _fetch(hub_id, revision, wanted)
    folder = snapshot_download(
        hub_id,
        revision=revision,
        local_files_only=offline,
        allow_patterns=wanted,
        ignore_patterns=_NOT_TOP_LEVEL,
    )
    return Path(folder)


def _fetch(hub_id: str, revision: str | None, wanted: list[str]) -> None:
    """Bring the missing files into the cache, one after the other in this thread.

    `snapshot_download` would fetch them in threads, and Ctrl-C would wait for the last of them.
    """
    try:
        files = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=_NOT_TOP_LEVEL,
            dry_run=True,
        )
    except DryRunError:
        return  # the hub is out of reach: all may be cached, else the next step says what is wrong
    for file in files:
        if file.will_download:
            hf_hub_download(hub_id, file.filename, revision=file.commit_hash)


def _reason(error: Exception, hub_id: str, revision: str | None) -> str:
    """Say in one line what went wrong and what to do; the most special error first."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            "access is restricted; accept its licence on the hub's page of the model, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return "the hub has no such model (or it is private: `hf auth login` or set HF_TOKEN)"
    if isinstance(error, LocalEntryNotFoundError):
        which = f" at revision {revision!r}" if revision else ""
        return (
            f"not complete in the local cache{which}, and the hub is out of reach "
            "(offline mode, or no connection)"
        )
    if isinstance(error, HFValidationError):
        return f"{hub_id!r} is not a hub id of the form ORG/NAME"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space or set HF_HOME to a larger disk, then try again"
    text = f"{type(error).__name__}: {one_line(error)}"
    return f"download failed: {text} (finished files are kept: try again)"
