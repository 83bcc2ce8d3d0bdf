"""Commands that our messages tell people to run: they must install this project, not another."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from edgekit.common.install import install_command
from edgekit.version import DISTRIBUTION

CASES = [
    (None, f"pip install '{DISTRIBUTION}[gguf]'"),
    (
        {"url": "file:///home/me/my%20work/edgekit", "dir_info": {"editable": True}},
        "pip install -e '/home/me/my work/edgekit[gguf]'",
    ),
    ({"url": "file:///srv/edgekit", "dir_info": {}}, "pip install '/srv/edgekit[gguf]'"),
    (
        {
            "url": "https://example.org/edgekit.git",
            "vcs_info": {"vcs": "git", "commit_id": "a1b2c3"},
        },
        f"pip install '{DISTRIBUTION}[gguf] @ git+https://example.org/edgekit.git@a1b2c3'",
    ),
    (
        {"url": "file:///tmp/edgekit.whl", "archive_info": {}},
        f"pip install '{DISTRIBUTION}[gguf] @ file:///tmp/edgekit.whl'",
    ),
]


class _Installed(metadata.Distribution):
    """A distribution with the record that pip leaves of where it came from."""

    def __init__(self, record: object) -> None:
        self._record = record

    def read_text(self, filename: str) -> str | None:
        wanted = filename == "direct_url.json" and self._record is not None
        return json.dumps(self._record) if wanted else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


@pytest.mark.parametrize(("record", "command"), CASES)
def test_the_command_follows_how_this_copy_was_installed(
    monkeypatch: pytest.MonkeyPatch, record: object, command: str
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: _Installed(record))
    assert install_command("gguf") == command


def test_a_bare_checkout_is_named_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    root = Path(__file__).parents[2]
    assert install_command("onnx") == f"pip install '{root}[onnx]'"
