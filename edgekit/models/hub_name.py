"""What people paste to name a model on the hub: an id, the address of its page, an `hf://` path."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from edgekit.errors import EdgekitError

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(f"{_PART}/{_PART}", re.ASCII)
_OTHER_KINDS = {"datasets": "a data set", "spaces": "a space", "buckets": "a bucket"}
_BEFORE_A_REVISION = ("tree", "blob", "resolve", "raw", "commit", "commits")
"""What an address of the hub has between a model and a revision, before the path of a file."""


@dataclass(frozen=True)
class HubName:
    """A model's id `ORG/NAME`, and the branch, tag or commit that was named with it."""

    id: str
    revision: str | None = None


def parse_hub_name(text: str) -> HubName | None:
    """Read `ORG/NAME`, `ORG/NAME@REVISION`, `hf://...` or the address of a model's page or file.

    None for what is none of them. EdgekitError for an address of something else.
    """
    parts, is_address = _parts(text.strip())
    if parts[-1].endswith("@"):
        raise EdgekitError(f"{text:.200}: names no revision behind the @")
    if parts[:2] == ["api", "models"]:
        parts = parts[2:]
    elif parts[0] == "models" and len(parts) > 2:
        parts = parts[1:]
    if parts[0] in _OTHER_KINDS:
        raise EdgekitError(f"{text:.200}: names {_OTHER_KINDS[parts[0]]} on the hub, no model")
    found = _parse(parts, is_address)
    if found is None and is_address:
        raise EdgekitError(
            f"{text:.200}: names no model on the hub; give ORG/NAME, ORG/NAME@REVISION or the "
            "address of a model's page"
        )
    return found


def one_revision(text: str, named: str | None, option: str | None) -> str | None:
    """Return the revision that was named with a model or by --revision; EdgekitError for two."""
    if None not in (named, option) and named != option:
        raise EdgekitError(
            f"{text:.200}: names revision {named!r}, `revision` {option!r}: give one of them"
        )
    return option if named is None else named


def _parts(text: str) -> tuple[list[str], bool]:
    """Return what follows scheme and host, taken apart, and whether there was one of them.

    A branch with slashes is one part of an address, where they are written %2F.
    """
    scheme, mark, rest = text.partition("://")
    if mark and scheme.lower() == "hf":
        return rest.strip("/").split("/"), True
    host, address = _host(text if mark else f"//{text}")
    if mark and (scheme.lower() not in ("http", "https") or host not in _hosts()):
        raise EdgekitError(f"{text:.200}: is no address of the hub, whose host is {_HOSTS[0]}")
    if mark or host in _hosts():
        return [unquote(part) for part in address.split("/") if part] or [""], True
    return text.rstrip("/").split("/"), False


def _host(address: str) -> tuple[str, str]:
    """Return the host and the path of an address; none where it is malformed."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "", ""
    return parts.netloc.rpartition("@")[2].lower(), parts.path


def _hosts() -> tuple[str, ...]:
    """The hub's, and that of a mirror that is set by HF_ENDPOINT."""
    mirror, _ = _host(os.environ.get("HF_ENDPOINT", ""))
    return (*_HOSTS, mirror) if mirror else _HOSTS


def _parse(parts: list[str], is_address: bool) -> HubName | None:
    if len(parts) < 2:
        return None
    name, at, revision = parts[1].partition("@")
    hub_id, rest = f"{parts[0]}/{name}", parts[2:]
    if not _ID.fullmatch(hub_id):
        return None
    if at:
        # A branch may have slashes; in an address a file's path may follow it.
        more = len(rest) if not is_address else 2 if revision == "refs" else 0
        revision = "/".join([revision, *rest[:more]])
    elif rest and rest[0] in _BEFORE_A_REVISION:
        more = 3 if rest[1:2] == ["refs"] else 1
        revision = "/".join(rest[1 : 1 + more])
    elif rest and not is_address:
        return None
    return HubName(hub_id, revision or None)
