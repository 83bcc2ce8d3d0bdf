"""The command as tests run it: in a process of its own, killed, and refusing in one line."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edgekit.cli import main


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def done(*arguments: object) -> dict[str, Any]:
    """The same; it succeeds, and what it prints is JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def edgekit(
    *words: object, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekit", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, preexec_fn=prepare
    )


def assert_one_line(status: int, errors: str, *words: str) -> None:
    """A mistake: status 2 and one line on stderr that says each of the words."""
    assert "Traceback" not in errors
    assert status == 2, errors
    _assert_says(errors, words)


def assert_only_one_line(done: Result, *words: str, status: int = 2) -> None:
    """The same of a command run in this process; on stdout is nothing, or with --json the error."""
    assert done.exit_code == status
    _assert_says(done.stderr, words)
    if done.stdout:
        error = json.loads(done.stdout)["error"]
        assert error["status"] == status
        assert all(word in error["message"] for word in words)


def assert_codes_refused(model: Path, codes: Path) -> None:
    """An export of damaged codes: status 2, one line that names the file, and no artifact."""
    out = codes.with_name("out")
    refused = run("export", model, "--target", "gguf", "--codes", codes, "-o", out)
    assert refused.exit_code == 2, refused.output
    assert refused.stderr.count("\n") == 1
    assert str(codes) in refused.stderr
    assert not out.exists()


def _assert_says(errors: str, words: Sequence[str]) -> None:
    assert errors.startswith("edgekit: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors


def killed_at(stage: str, stages: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """Run the command with stderr a terminal, kill it when it names the stage; stages named."""
    command = [sys.executable, "-m", "edgekit", *words]
    keyboard, screen = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=screen) as process:
        os.close(screen)
        named: list[str] = []
        with os.fdopen(keyboard, errors="replace") as terminal:
            for line in terminal:
                named += [stage for stage in stages if line.rstrip().endswith(f"] {stage}")]
                if stage in named:
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.wait(timeout=60) == -signal.SIGKILL
    return tuple(named)


def interrupted_when(
    begun: Callable[[], bool],
    words: Sequence[str],
    number: signal.Signals = signal.SIGINT,
    status: int = 130,
) -> str:
    """Run the command, send Ctrl-C or another signal when it has begun; its stderr."""
    command = [sys.executable, "-m", "edgekit", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        while not begun():
            assert process.poll() is None
        process.send_signal(number)
        errors = process.stderr.read().decode()
        assert process.wait(timeout=120) == status
    return errors
