"""Why the hub gave no model: one line that says what happened and what to do."""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    DryRunError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from edgekit.common.files import os_reason
from edgekit.errors import one_line

_KEPT = "(finished files are kept)"
_MOST_COMMITS = 3


def reason(error: Exception, hub_id: str, revision: str | None) -> str:
    """Say in one line what went wrong and what to do; the most special error first."""
    found = _root(error)
    if isinstance(found, HFValidationError):
        return f"{hub_id!r} is not a hub id of the form ORG/NAME"
    if (wrong := _wrong_token()) is not None:
        return wrong
    if isinstance(found, RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(found, HfHubHTTPError):
        return _of_status(found)
    if isinstance(found, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return _not_cached(hub_id, revision, "offline mode")
    if isinstance(found, FileMetadataError) or _is_no_json(found):
        return (
            "what answers is not the hub: its answer describes no model. A network's login page, "
            f"a proxy or HF_ENDPOINT stands in its place ({constants.ENDPOINT}): open a page in a "
            "browser, or check these settings"
        )
    return _of_connection(found, hub_id, revision) or _of_files(found)


def _root(error: BaseException) -> BaseException:
    """Return the answer behind an error that says only that the cache had to do without it."""
    while isinstance(error, DryRunError | LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _of_status(error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, _said(error)
    if isinstance(error, DisabledRepoError) or (status == 403 and "disabled" in said.lower()):
        return "the hub has disabled it, for everybody: no token helps; choose another model"
    if isinstance(error, GatedRepoError):
        whose = f", with the account that {_token_place()} is of" if _token_place() else ""
        then = "" if whose else ", then log in with `hf auth login` or set HF_TOKEN"
        return (
            f"access is restricted; accept its licence on the hub's page of the model{whose}{then}"
        )
    if status == 401 and re.search("credentials|token", said, re.IGNORECASE):
        return (
            f"the hub rejects the token of {_token_place() or 'the request'}: it is wrong or has "
            "expired; log in again with `hf auth login`, or remove it: public models need none"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        private = "`hf auth login` or set HF_TOKEN"
        if _token_place():
            private = f"the token of {_token_place()} may not read it"
        return f"the hub has no such model (or it is private: {private})"
    if status == 403:
        return f"the hub forbids it (403{said and ': '}{said}); may the token read it?"
    if status == 429:
        more = "" if _token_place() else "; with a token (`hf auth login`) the hub allows more"
        return f"the hub allows no more requests for now (429): try again {_when(error)}{more}"
    name = _phrase(status)
    if status >= 500:
        return f"the hub is in trouble ({name}): try again later {_KEPT}"
    return f"the hub refuses the request ({name}{said and ': '}{said}) {_KEPT}"


def _said(error: HfHubHTTPError) -> str:
    """Return the hub's own words."""
    words = error.server_message or error.response.headers.get("X-Error-Message") or ""
    return one_line(ValueError(words)) if words else ""


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _when(error: HfHubHTTPError) -> str:
    """Return when the hub wants to be asked again: `Retry-After`, or `t` of `RateLimit`."""
    headers = error.response.headers
    after = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", "")) or re.search(
        r"\bt=(\d{1,9})\b", headers.get("RateLimit", "")
    )
    return "later" if after is None else f"in {int(after[1]):,} s"


def _token_place() -> str | None:
    """Return where the token comes from that is sent with requests."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name):
            return name
    return constants.HF_TOKEN_PATH if Path(constants.HF_TOKEN_PATH).is_file() else None


def _wrong_token() -> str | None:
    """Say what is wrong with a token that no request can carry; its letters are not shown."""
    try:
        token = get_token() or ""
    except UnicodeDecodeError:
        token = "\0"
    except PermissionError as error:
        return f"the token cannot be read: {constants.HF_TOKEN_PATH}: {os_reason(error)}"
    except Exception:  # noqa: BLE001  (a login that cannot be renewed: the request says so)
        return None
    if token.isascii() and token.isprintable():
        return None
    return (
        f"the token of {_token_place()} has letters that no token has (only ASCII ones do): copy "
        "it again, or log in with `hf auth login`"
    )


def _is_no_json(error: BaseException) -> bool:
    """Whether an answer that is not JSON, or JSON of something else, failed in the hub's library.

    An error of the same kind in edgekit's own code is a fault of ours, and no portal's.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is None or trace.tb_frame.f_globals.get("__name__", "").startswith("edgekit.")
    kinds = ValueError | KeyError | TypeError | AssertionError | AttributeError
    return isinstance(error, kinds) and not ours


def _of_connection(error: BaseException, hub_id: str, revision: str | None) -> str | None:
    """Say why nothing answered; None where it was something else."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = one_line(error)
    if "ProxyError" in kinds:
        return f"the proxy does not let it through ({said}): check HTTPS_PROXY and NO_PROXY"
    if "TooManyRedirects" in kinds:
        return (
            f"what answers sends the request in circles: check HF_ENDPOINT ({constants.ENDPOINT})"
        )
    if "UnsupportedProtocol" in kinds or "InvalidURL" in kinds:
        return f"HF_ENDPOINT {constants.ENDPOINT!r} is no address such as https://HOST"
    if not kinds & {"TransportError", "ConnectionError", "TimeoutError"}:
        return None
    if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)) or "SSL" in said:
        return (
            f"the connection cannot be trusted ({said}): where a proxy or a login page stands "
            "between, set SSL_CERT_FILE to its certificate, or log in to the network"
        )
    if "TimeoutException" in kinds or "TimeoutError" in kinds:
        return _not_cached(hub_id, revision, "no answer in time")
    if any(isinstance(cause, socket.gaierror) for cause in _causes(error)):
        return _not_cached(hub_id, revision, f"the host of {constants.ENDPOINT} is not found")
    if "ConnectError" in kinds:
        return _not_cached(hub_id, revision, f"no connection: {said}")
    return f"the connection broke ({said}): try again {_KEPT}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _not_cached(hub_id: str, revision: str | None, why: str) -> str:
    """Say what the local cache lacks, for nothing else is there."""
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")
    wanted = revision or constants.DEFAULT_REVISION
    commits = _commits(place)
    known = wanted in commits or (place / "refs" / wanted).is_file()
    unreached = f"the hub is out of reach ({why})"
    if known or not commits:
        which = f" at revision {revision!r}" if revision else ""
        return f"not complete in the local cache{which}, and {unreached}"
    several = ", ".join(commits[:_MOST_COMMITS]) + (", ..." if commits[_MOST_COMMITS:] else "")
    return (
        f"the local cache does not say which commit {wanted!r} is, and {unreached}; name one that "
        f"is there, as in {hub_id}@{commits[0]}" + (f" (of {several})" if commits[1:] else "")
    )


def _commits(place: Path) -> list[str]:
    try:
        return sorted(folder.name for folder in (place / "snapshots").iterdir())
    except OSError:
        return []


def _of_files(error: BaseException) -> str:
    """Say what hindered writing the cache, or whatever else it was."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = "disk is full" if error.errno == errno.ENOSPC else "quota is used up"
        return f"the {full}; free some space or set HF_HOME to a larger disk, then try again"
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"the local cache cannot be written: {error.filename or constants.HF_HUB_CACHE}: "
            f"{os_reason(error)}; set HF_HOME to a folder of your own"
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "a file arrived in another length than the hub states: try again"
    return f"download failed: {type(error).__name__}: {one_line(error)} {_KEPT}"
