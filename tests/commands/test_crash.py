"""Native libraries that take the process with them: one line, status 1, nothing half-written.

The crash is real: a shared library, compiled here, that writes to stderr and aborts or reads from
address 0, called where an engine would be.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.gguf_models import small_model_file

from edgekit.common.files import new_file
from edgekit.runtime.engines.first_load import check_first_load

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

_LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
void abort_loudly(void) {
    fputs("terminate called after throwing an instance of 'std::length_error'\n", stderr);
    fputs("  what():  a vector of terror\n", stderr);
    abort();
}
void read_nowhere(void) { *(volatile int *)0; }
"""

# Python runs it first in every process. CRASH=module:attribute:function replaces what an engine
# calls, once its module has been imported.
_SITE = """
import ctypes, importlib.abc, os, sys

module, attribute, function = os.environ["CRASH"].split(":")
library = ctypes.CDLL(os.environ["CRASH_LIBRARY"])

def die(*arguments, **options):
    getattr(library, function)()

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)  # who only asks whether it is there imports it later
        run = spec.loader.exec_module
        def exec_module(loaded):
            run(loaded)
            owner, _, last = attribute.rpartition(".")
            setattr(getattr(loaded, owner) if owner else loaded, last, die)
        spec.loader.exec_module = exec_module
        return spec

import importlib.util
sys.meta_path.insert(0, Finder())
"""

# Where an engine is called: while it loads a file, and while it computes.
LOADS = {
    "gguf": "llama_cpp.llama_cpp:llama_model_load_from_file",
    "executorch": "edgekit.runtime.engines.executorch.binding:load_program",
    "onnx": "edgekit.runtime.engines.onnx.decoder:open_session",
}
COMPUTES = {
    "gguf": "llama_cpp.llama_cpp:llama_decode",
    "executorch": "edgekit.runtime.engines.executorch.decoder:ExecutorchEngine._forward",
    "onnx": "edgekit.runtime.engines.onnx.decoder:_Runner.__call__",
}
LAST = "what():  a vector of terror"
NAMES = {"gguf": "llama.cpp (llama-cpp-python ", "executorch": "ExecuTorch 1", "onnx": "ONNX Runti"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, the site module and a small model."""
    folder = tmp_path_factory.mktemp("crash")
    source = folder / "crash.c"
    source.write_text(_LIBRARY)
    command = ["cc", "-shared", "-fPIC", "-O0", "-o", str(folder / "crash.so"), str(source)]
    subprocess.run(command, check=True)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_SITE)
    small_model_file(folder)
    check_first_load("gguf")  # before it crashes
    return folder


@pytest.fixture(scope="module")
def artifacts(place: Path) -> dict[str, Path]:
    """A small artifact for each target."""
    made = {}
    for target in COMPUTES:
        made[target] = place / f"artifact-{target}"
        words = ["export", str(place / "small"), "--int8", "--context", "64", "--target", target]
        done = _edgekit([*words, "-o", str(made[target])])
        assert done.returncode == 0, done.stderr
    return made


def _edgekit(
    words: list[str], crash: str | None = None, place: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environ}
    if crash is not None and place is not None:
        path = os.pathsep.join([str(place / "site"), *env.get("PYTHONPATH", "").split(os.pathsep)])
        env |= {"PYTHONPATH": path.rstrip(os.pathsep), "CRASH": crash}
        env |= {"CRASH_LIBRARY": str(place / "crash.so")}
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=env,
    )


def _assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stderr
    progress = re.compile(r"\[ *\d+\.\d s\] ")  # of work that takes more than half a minute
    lines = [line for line in done.stderr.splitlines() if not progress.match(line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("edgekit: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    "crash", [f"{COMPUTES['gguf']}:abort_loudly", LOADS["gguf"] + ":abort_loudly"]
)
def test_of_what_a_library_says_the_last_line_is_quoted(crash: str, place: Path) -> None:
    done = _edgekit(["run", str(place / "model.gguf"), "hello", "--raw", "--json"], crash, place)
    _assert_one_line(done, f"{place}/model.gguf: ", NAMES["gguf"], f"SIGABRT: {LAST}; ")
    said = json.loads(done.stdout)["error"]
    assert said == {"message": done.stderr.removeprefix("edgekit: ").rstrip("\n"), "status": 1}


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPUTES)
def test_a_crash_while_an_engine_computes_is_one_line(
    target: str, place: Path, artifacts: dict[str, Path]
) -> None:
    artifact = artifacts[target]
    before = (artifact / "edgekit.json").read_bytes()
    text = place / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 40)
    words = {
        "run": ["run", str(artifact), "hello", "--raw"],
        "eval": ["eval", str(artifact), "--text", str(text), "--context", "32", "--chunks", "1"],
        "verify": ["verify", str(artifact), "--model", str(place / "small")],
    }
    for command in words.values():
        done = _edgekit(command, f"{COMPUTES[target]}:read_nowhere", place)
        _assert_one_line(done, f"{artifact}/model", NAMES[target], "SIGSEGV", "pip install")
        assert done.stdout == ""
    assert (artifact / "edgekit.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("target", LOADS)
def test_a_crash_while_an_engine_loads_is_one_line(
    target: str, place: Path, artifacts: dict[str, Path]
) -> None:
    crash = f"{LOADS[target]}:abort_loudly"
    done = _edgekit(["run", str(artifacts[target]), "hello", "--raw", "--json"], crash, place)
    _assert_one_line(done, f"SIGABRT: {LAST}; ", NAMES[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", COMPUTES)
def test_an_export_whose_engine_crashes_leaves_nothing(
    target: str, place: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    words = ["export", str(place / "small"), "--int8", "--context", "64", "--target", target]
    crash = f"{COMPUTES[target]}:abort_loudly"
    done = _edgekit([*words, "-o", str(tmp_path / "out"), "--json"], crash, place)
    _assert_one_line(done, NAMES[target], "SIGABRT")
    assert list(tmp_path.iterdir()) == []


def test_bench_and_compare_name_the_artifact_whose_engine_crashed(
    place: Path, tmp_path: Path
) -> None:
    crash, sizes = f"{COMPUTES['gguf']}:read_nowhere", ["-p", "4", "-n", "2", "-r", "1", "-t", "1"]
    for words in (
        ["bench", str(place / "model.gguf"), *sizes, "-o", str(tmp_path / "record.json")],
        ["compare", str(place / "model.gguf"), *sizes, "-o", str(tmp_path / "page.html")],
    ):
        done = _edgekit(words, crash, place)
        _assert_one_line(done, "model.gguf: pp4: llama.cpp (llama-cpp-python ", "SIGSEGV")
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


_NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
"""
MODULES = {
    "executorch": "edgekit.runtime.engines.executorch.network:",
    "onnx": "edgekit.runtime.engines.onnx.network:",
}
MODULE_LOADS = {"executorch": "load_program", "onnx": "open_session"}
MODULE_RUNS = {"executorch": "ExecutorchModule.run", "onnx": "OnnxModule.run"}


@pytest.mark.slow
@pytest.mark.parametrize("target", MODULES)
def test_a_crash_under_a_module_is_one_line_and_leaves_nothing(
    target: str, place: Path, tmp_path: Path
) -> None:
    file, made = tmp_path / "net.py", tmp_path / "made"
    file.write_text(_NET)
    words = ["export", f"{file}:net", "--example-shape", "1x3x4x4", "--scheme", "float"]
    words += ["--target", target, "-o"]
    assert _edgekit([*words, str(made)]).returncode == 0
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    loads, runs = (f"{MODULES[target]}{each[target]}" for each in (MODULE_LOADS, MODULE_RUNS))
    record = str(tmp_path / "record.json")
    for crash in (f"{loads}:abort_loudly", f"{runs}:read_nowhere"):
        for command in (
            [*words, str(tmp_path / "out"), "--json"],
            ["verify", str(made)],
            ["bench", str(made), "-r", "1", "-t", "1", "-o", record],
        ):
            done = _edgekit(command, crash, place)
            _assert_one_line(done, NAMES[target], "SIGABRT" if crash.endswith("loudly") else "SIGS")
            said = done.stderr.removeprefix("edgekit: ").rstrip("\n")
            error = json.dumps({"error": {"message": said, "status": 1}})
            assert done.stdout == (f"{error}\n" if "--json" in command else "")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"net.py", "made"}


@pytest.mark.parametrize(
    ("command", "crash"),
    [
        ("quantize", "edgekit.quantize.storage:save_file"),
        ("imatrix", "edgekit.exporters.gguf.llama.imatrix:write_gguf"),
    ],
)
def test_a_crash_of_a_command_without_an_engine_is_one_line(
    command: str, crash: str, place: Path, tmp_path: Path
) -> None:
    """While the file is being written, of which nothing stays."""
    text = place / "words.txt"
    text.write_text("Once upon a time there was a little dog. " * 40)
    words = {
        "quantize": ["--int8"],
        "imatrix": ["--text", str(text), "--context", "32", "--chunks", "1"],
    }
    out = tmp_path / "out"
    done = _edgekit(
        [command, str(place / "small"), *words[command], "-o", str(out)],
        f"{crash}:abort_loudly",
        place,
    )
    _assert_one_line(done, f"the command was ended by SIGABRT: {LAST}; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_crash_under_inspect_is_one_line(place: Path, artifacts: dict[str, Path]) -> None:
    crash = "onnxruntime:InferenceSession:read_nowhere"
    done = _edgekit(["inspect", str(artifacts["onnx"])], crash, place)
    _assert_one_line(done, str(artifacts["onnx"]), NAMES["onnx"], "SIGSEGV")
    assert done.stdout == ""


def test_an_assertion_of_ggml_is_quoted_and_not_traced(place: Path, tmp_path: Path) -> None:
    """ggml's own abort, reached through the library that is loaded."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        _SITE.replace(
            "getattr(library, function)()",
            "sys.modules[module]._lib.ggml_abort(b'/x/ggml.c', 12, b'GGML_ASSERT(a: b) failed')",
        )
    )
    shutil.copy(place / "crash.so", tmp_path)
    crash = f"{COMPUTES['gguf']}:abort"
    done = _edgekit(["run", str(place / "model.gguf"), "hello", "--raw"], crash, tmp_path)
    _assert_one_line(done, "SIGABRT: ggml.c:12: GGML_ASSERT(a: b) failed; ")


def test_a_library_that_does_not_survive_its_first_load_is_named_with_the_remedy(
    place: Path, tmp_path: Path
) -> None:
    crash = f"{COMPUTES['gguf']}:read_nowhere"
    words = ["run", str(place / "model.gguf"), "hello", "--raw"]
    cache = str(tmp_path / "cache")
    for _ in range(2):  # what died is tried again
        done = _edgekit(words, crash, place, XDG_CACHE_HOME=cache)
        _assert_one_line(
            done,
            "llama.cpp (llama-cpp-python ",
            "does not work on this machine: running a small model ended in SIGSEGV; ",
            "pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python==",
        )
    done = _edgekit(
        ["bench", words[1], "-p", "4", "-n", "0", "-r", "1"], crash, place, XDG_CACHE_HOME=cache
    )
    _assert_one_line(done, "model.gguf: ", "does not work on this machine: ")
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert _edgekit(words, XDG_CACHE_HOME=cache).returncode == 0
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


def test_what_survived_is_kept_by_library_and_cpu_and_a_damaged_note_is_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tried = []

    def survives(engine: str) -> bool:
        tried.append(engine)
        return True

    monkeypatch.setattr("edgekit.runtime.engines.first_load._survives", survives)
    for _ in range(2):
        check_first_load.cache_clear()
        check_first_load("onnx")
    assert tried == ["onnx"]
    (note,) = (tmp_path / "edgekit" / "first-load").iterdir()
    key = json.loads(note.read_text())
    assert key["engine"] == "onnx"
    assert any("onnxruntime" in path for path, _, _ in key["code"])
    for damage in ("", "{", json.dumps({**key, "cpu": ["another"]})):
        note.write_text(damage)
        check_first_load.cache_clear()
        check_first_load("onnx")
    assert tried == ["onnx"] * 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept in it
    check_first_load.cache_clear()
    check_first_load("onnx")
    assert tried == ["onnx"] * 5
    check_first_load.cache_clear()


# A command of our own, run as edgekit's are.
_COMMAND = """
import os, signal, sys, time
from pathlib import Path
sys.argv = ["edgekit", "work", *sys.argv[1:]]
from edgekit.supervisor import supervise
supervise()
from edgekit.common.files import new_file
{body}
"""


def _command(
    body: str, *arguments: str, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _COMMAND.format(body=body), *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=prepare,
    )


@pytest.mark.parametrize("status", [0, 1, 2, 70, 130])
def test_a_command_that_ends_by_itself_keeps_its_status_and_what_it_wrote(status: int) -> None:
    body = "os.write(2, b'native\\n'); print('out'); print('own', file=sys.stderr)\n"
    done = _command(f"{body}sys.exit({status})")
    assert (done.returncode, done.stdout) == (status, "out\n")
    assert sorted(done.stderr.splitlines()) == ["native", "own"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_command_ends_the_supervisor_by_the_same(
    number: signal.Signals,
) -> None:
    body = f"signal.signal({number:d}, signal.SIG_DFL); os.kill(os.getpid(), {number:d})"
    done = _command(body)
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_reaches_the_command(number: signal.Signals) -> None:
    body = (
        f"signal.signal({number:d}, lambda *_: sys.exit(7))\n"
        f"os.kill(os.getppid(), {number:d})\nsignal.pause()"
    )
    assert _command(body).returncode == 7


def test_a_killed_command_is_said_to_be_out_of_memory_and_its_file_is_gone(tmp_path: Path) -> None:
    body = (
        "with new_file(Path(sys.argv[2])) as scratch:\n"
        "    scratch.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = _command(body, str(tmp_path / "out.json"))
    _assert_one_line(done, "SIGKILL", "memory runs out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_dies_with_its_supervisor() -> None:
    body = "print(os.getpid(), flush=True); os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    done = _command(body)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 60
    while Path("/proc", done.stdout.strip()).exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path("/proc", done.stdout.strip()).exists()


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_streams_do_no_harm(closed: int) -> None:
    body = "os.write(2, b'said\\n'); sys.exit(3)"
    assert _command(body, prepare=lambda: os.close(closed)).returncode == 3


def test_what_killed_commands_left_of_a_file_is_removed_by_the_next(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import os; print(os.getpid())"]
    dead = subprocess.run(program, capture_output=True, check=True)
    left = tmp_path / f".out.json.{int(dead.stdout)}.partial"
    others = tmp_path / f".out.json.{os.getppid()}.partial"  # who is at work on it
    left.touch()
    others.touch()
    with new_file(tmp_path / "out.json") as scratch:
        scratch.touch()
    assert sorted(tmp_path.iterdir()) == sorted([others, tmp_path / "out.json"])


@pytest.fixture(autouse=True)
def _no_core_dumps() -> Iterator[None]:
    """A crash is wanted here; a file of it is not."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)
