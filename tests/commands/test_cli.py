"""The `edgekit` command itself: help, what it may import, and how it ends when something fails."""

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import edgekit
import edgekit.runtime.engines
from edgekit.cli import COMMANDS, DEFECT, INTERRUPTED, MISTAKE, READER_GONE, describe, main
from edgekit.commands._progress import progress_line
from edgekit.common import progress
from edgekit.errors import EdgekitError, Interrupted, VerificationError
from edgekit.exporters.registry import TARGETS

# Besides the standard library. `_distutils_hack` and the finders of editable installations are
# imported by Python's start-up from .pth files, before any line of edgekit runs.
LEAN = re.compile(r"click|edgekit|__main__|__mp_main__|_distutils_hack|__editable__.*|_virtualenv")
# Nothing that does the work, even where it would be cheap to import; how OpenMP is to wait is said
# before any command loads it.
LEAN_EDGEKIT = re.compile(
    r"edgekit(\.cli|\.errors|\.version|\.commands(\..+)?"
    r"|\.devices(\.cpus|\.probe(\.rootfs)?|\.hosts(\.host|\.local)?)?)?"
)

_SHOW_MODULES = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
from edgekit.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)])
def test_help_imports_click_only(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHOW_MODULES, *arguments, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: ")
    modules = json.loads(done.stderr.splitlines()[-1])
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert [name for name in sorted(packages) if not LEAN.fullmatch(name)] == []
    own = [name for name in modules if name.partition(".")[0] == "edgekit"]
    assert [name for name in own if not LEAN_EDGEKIT.fullmatch(name)] == []


TRIALS = Path(edgekit.runtime.engines.__file__).parent / "trial_models"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("fit", "lfm2-1.2b", "--target", target, "--no-measure") for target in TARGETS.packages),
        *(("export", "lfm2-tiny", "--target", name, "--dry-run") for name in TARGETS.packages),
        ("export", "lfm2-tiny", "--target", "gguf", "--scheme", "w6g16", "--dry-run"),
        ("export", "lfm2-tiny", "--target", "gguf", "--scheme", "Q4_K_M", "--dry-run"),
        *(("inspect", str(TRIALS / f"model.{suffix}")) for suffix in ("pte", "gguf", "onnx")),
        ("models",),
        ("devices",),
    ],
)
def test_what_answers_at_once_needs_no_torch(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SHOW_MODULES, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    heavy = {"torch", "executorch", "safetensors", "transformers"}
    assert heavy & set(json.loads(done.stderr.splitlines()[-1])) == set()


def test_help_lists_every_command_file_with_a_summary() -> None:
    said = CliRunner().invoke(main, ["--help"]).output
    listed = re.findall(r"^  (\w+) +\w", said.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name: str) -> None:
    command = main.get_command(click.Context(main), name) if isinstance(main, click.Group) else None
    assert command is not None
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgekit", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"edgekit, version {edgekit.__version__}\n"


def test_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["exprot"])
    assert result.exit_code == MISTAKE
    said = "edgekit: No such command 'exprot'. Did you mean 'export'? (see `main --help`)\n"
    assert result.stderr == said


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "lfm2-tiny"],
        ["run", "--bogus"],
        ["bench", "a", "-r", "0"],
        ["devices", "a", "b\nc"],
        ["no\nsuch"],
        ["run", "no\nsuch", "hello"],
        ["inspect", "\x1b[31m"],
        ["fit", "no\x85such"],
        ["quantize", "x" * 100_000],
    ],
)
def test_a_mistake_on_the_command_line_is_one_printable_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (MISTAKE, "")
    assert result.stderr.endswith("\n")
    assert result.stderr[:-1].isprintable()
    assert len(result.stderr) < 1100


def test_no_command_at_all_shows_the_help() -> None:
    assert CliRunner().invoke(main, []).stderr.startswith("Usage: ")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], "click.testing.Result"]:
    """Run a command that fails with the error given."""

    def run(error: BaseException) -> "click.testing.Result":
        @click.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(type(main), "get_command", lambda self, ctx, name: fail)
        return CliRunner().invoke(main, ["fail"])

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (EdgekitError("no model 'x'"), 2, "edgekit: no model 'x'"),
        (VerificationError("drift"), 1, "edgekit: drift"),
        (EdgekitError("a\nb\x1b[31m\udcff"), 2, r"edgekit: a\nb\x1b[31m\udcff"),
        (EdgekitError("x" * 99_999), 2, f"edgekit: {'x' * 500} ... {'x' * 500}"),
        (KeyboardInterrupt(), INTERRUPTED, "edgekit: interrupted"),
        (Interrupted("some are kept"), INTERRUPTED, "edgekit: some are kept"),
        (MemoryError(), MISTAKE, "edgekit: not enough memory"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.pte"),
            MISTAKE,
            "edgekit: out/model.pte: No space left on device",
        ),
        (
            ValueError("two\n  lines"),
            DEFECT,
            "edgekit: internal error: ValueError: two lines (EDGEKIT_TRACEBACK=1 shows where)",
        ),
    ],
)
def test_an_error_is_one_line_and_a_status(
    failing: Callable[[BaseException], "click.testing.Result"],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", line + "\n")


def test_a_traceback_is_given_to_those_who_ask(
    failing: Callable[[BaseException], "click.testing.Result"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKIT_TRACEBACK", "1")
    error = ValueError("where")
    assert failing(error).exception is error


def test_an_allocation_that_torch_cannot_make_is_no_defect() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert describe(caught.value) == ("not enough memory", MISTAKE)


@pytest.mark.parametrize("arguments", [["--help"], ["models", "--json"]])
def test_a_reader_that_goes_away_is_met_with_silence(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgekit", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == READER_GONE


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"], ["run", "--help"]])
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgekit", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (MISTAKE, "edgekit: No space left on device\n")


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_the_caller_closed_is_no_defect(closed: str) -> None:
    number = {"stdout": 1, "stderr": 2}[closed]
    command = f"exec {sys.executable} -m edgekit fit lfm2-tiny --no-measure {number}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "stderr")


def test_a_mistake_without_stderr_is_no_defect() -> None:
    """Of `edgekit.cli` itself, which a caller may run without `python -m edgekit`'s repairs."""
    script = "import sys; assert sys.stderr is None; from edgekit.cli import main; main()"
    command = 'exec "$@" 2>&-'
    python = (sys.executable, "-c", script, "eval", "missing", "--text", __file__)
    done = subprocess.run(["sh", "-c", command, "sh", *python], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (MISTAKE, b"", b"")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_progress_is_cleared_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(EdgekitError), progress_line() as show:
        show(1, 2, "chunks")
        raise EdgekitError("wrong")
    assert terminal.getvalue() == "\r\x1b[K[1/2] chunks\r\x1b[K"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_without_a_terminal_a_line_of_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    clock = Clock(monkeypatch)
    with progress_line() as show:
        for done in range(7):
            show(done, 9, "layers")
            clock.now += 11
    assert stream.getvalue() == "[3/9] layers\n[6/9] layers\n"


def test_without_a_terminal_stages_of_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    clock = Clock(monkeypatch)
    show = progress.stage_printer()
    for seconds, stage in ((0, "tracing"), (29, "quantizing"), (2, "writing"), (29, "verifying")):
        clock.now += seconds
        show(stage)
    assert stream.getvalue() == "[  31.0 s] writing\n"


def test_progress_without_stderr_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    clock = Clock(monkeypatch)
    with progress_line() as show:
        clock.now += 100
        show(1, 2, "chunks")


def test_public_names_are_imported_when_used() -> None:
    script = (
        "import sys, edgekit\n"
        "assert 'torch' not in sys.modules\n"
        "print([name for name in edgekit.__all__ if getattr(edgekit, name).__name__ != name])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert set(edgekit.__all__) <= set(dir(edgekit))
    with pytest.raises(AttributeError, match="no attribute 'export_models'"):
        _ = edgekit.export_models
