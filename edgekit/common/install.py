"""How this copy of edgekit was installed, and the command that adds an extra to it."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edgekit.version import DISTRIBUTION


def install_command(extra: str) -> str:
    """Return the shell command that installs an extra beside what is there.

    It follows pip's record of the installation (PEP 610): a folder, editable or not, a repository,
    or an index. A bare checkout, which no record describes, is named by its folder.
    """
    try:
        record = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return f"pip install '{Path(__file__).parents[2]}[{extra}]'"
    if record is None:  # from an index
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    origin = json.loads(record)
    url = origin["url"]
    if "vcs_info" in origin:
        kind, commit = origin["vcs_info"]["vcs"], origin["vcs_info"]["commit_id"]
        return f"pip install '{DISTRIBUTION}[{extra}] @ {kind}+{url}@{commit}'"
    if "dir_info" not in origin:  # a wheel or an archive
        return f"pip install '{DISTRIBUTION}[{extra}] @ {url}'"
    folder = unquote(urlsplit(url).path)
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}'{folder}[{extra}]'"
