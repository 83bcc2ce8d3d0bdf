"""What a shell completes, asked as bash asks."""

import os
import subprocess
import sys

import pytest

from edgekit.commands._completion import _LLAMA_FORMATS, _SCHEMES
from edgekit.exporters.gguf.llama.formats import FORMATS
from edgekit.quantize.schemes.names import STATIC, parse_scheme


def completed(*words: str) -> list[str]:
    """Return what follows the last of the words, which may be the beginning of one."""
    asked = {
        "_EDGEKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("edgekit", *words)),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-c", "from edgekit.__main__ import main; main()"]
    command[2] = "import sys; sys.argv = ['edgekit']; " + command[2]
    done = subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ex",), ["export"]),
        (("export", "lfm2-t"), ["lfm2-tiny"]),
        (("export", "LFM2-T"), ["lfm2-tiny"]),
        (("export", "./some"), ["./some"]),  # the shell goes on with files
        (("export", "lfm2-tiny", "--target", "g"), ["gguf"]),
        (("export", "lfm2-tiny", "--scheme", "Q4"), ["Q4_0", "Q4_K_M"]),
        (("fit", "lfm2-tiny", "--device", "rasp"), ["raspberry-pi-4", "raspberry-pi-5"]),
        (("devices", "loc"), ["local"]),
    ],
)
def test_names_are_completed(words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_schemes_that_are_offered_are_ones() -> None:
    assert tuple(FORMATS) == _LLAMA_FORMATS
    for name in _SCHEMES:
        assert STATIC.fullmatch(name) or parse_scheme(name).name == name
