"""The worker's protocol: spoken by hand, line by line, and by runners that are not edgekit's."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.foreign_gguf import write_foreign_gguf

from edgekit.devices.hosts.host import End, Interpreter
from edgekit.devices.hosts.local import LocalHost
from edgekit.errors import EdgekitError, EngineCrash
from edgekit.runtime.bench.accounting import MemoryUse
from edgekit.runtime.bench.decoder import bench
from edgekit.runtime.bench.worker import PROTOCOL
from edgekit.runtime.bench.worker_process import WorkerProcess, worker_processes
from edgekit.runtime.decode_bytes import Shape

WORKER = [sys.executable, "-m", "edgekit.runtime.bench.worker"]
OPS = ["bandwidth", "load_decoder", "time_decoder", "load_network", "time_network"]


@contextmanager
def spoken_to() -> Iterator["subprocess.Popen[str]"]:
    """A worker without anything of ours between it and the test."""
    pipe = subprocess.PIPE
    with subprocess.Popen(WORKER, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def ask(worker: "subprocess.Popen[str]", request: dict[str, Any]) -> dict[str, Any]:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    reply: dict[str, Any] = json.loads(worker.stdout.readline())
    return reply


def load(path: Path, context: int = 64) -> dict[str, Any]:
    asked = {"op": "load_decoder", "engine": "gguf", "model": str(path)}
    return asked | {"threads": 1, "context": context}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "Q8_0")


def test_a_conversation_by_hand(model: Path) -> None:
    with spoken_to() as worker:
        assert worker.stdin is not None and worker.stdout is not None
        hello = json.loads(worker.stdout.readline())
        assert (hello["protocol"], hello["ops"]) == (1, OPS)
        assert hello["runner"].startswith("edgekit ")
        assert "gguf" in hello["engines"]["decoder"]
        assert "onnx" in hello["engines"]["network"]

        loaded = ask(worker, load(model))
        assert (loaded["engine"], loaded["context"]) == ("gguf", 64)
        assert loaded["threads"] == {"prompt": 1, "decode": 1}
        assert loaded["affinity"] == sorted(os.sched_getaffinity(0))
        assert 0 < loaded["before_load_bytes"] < loaded["memory"]["peak_bytes"]
        assert 0 < loaded["memory"]["bytes"] <= loaded["memory"]["peak_bytes"]

        asked = {"op": "time_decoder", "tokens": 4, "depth": 2, "seed": 0}
        prompt = ask(worker, asked | {"kind": "pp"})
        assert prompt["first_token_ns"] >= prompt["elapsed_ns"] > 0
        assert prompt["token_ns"] == []
        decode = ask(worker, asked | {"kind": "tg"})
        assert decode["first_token_ns"] is None
        assert sum(decode["token_ns"]) == decode["elapsed_ns"]
        assert len(decode["token_ns"]) == 4
        assert set(decode["interference"]) == {"own", "other", "waited", "throttled"}

        worker.stdin.close()
        assert worker.wait(60) == 0


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"op": "dance"}', f"unknown op 'dance': known are {', '.join(OPS)}"),
        ("nonsense", "a line that is no JSON: 'nonsense'"),
        ("", "a line that is no JSON: ''"),
        ("[" * 100_000, f"a line that is no JSON: '{'[' * 59}"),
        ("\N{REPLACEMENT CHARACTER}", "a line that is no JSON: '\N{REPLACEMENT CHARACTER}'"),
        ("[1]", "a request must be a JSON object, not '[1]'"),
        ("{}", "op must be a string, got None"),
        ('{"op": "load_decoder"}', "engine must be a string, got None"),
        ('{"op": "bandwidth", "threads": true}', "threads must be an integer, got True"),
        ('{"op": "bandwidth", "threads": 0}', "threads and passes must be at least 1: 0 and 8"),
        (
            '{"op": "time_decoder", "kind": "pp", "tokens": 1, "depth": 0, "seed": 0}',
            "no decoder is loaded",
        ),
        ('{"op": "time_network", "inputs": []}', "no network is loaded"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_not_the_end(line: str, error: str) -> None:
    bytes_that_are_no_text = b"\xff\n"
    done = subprocess.run(
        WORKER, input=f"{line}\n".encode() + bytes_that_are_no_text, capture_output=True, check=True
    )
    _, first, second = map(json.loads, done.stdout.splitlines())
    assert first == {"error": error}
    assert second == {"error": "a line that is no JSON: '\N{REPLACEMENT CHARACTER}'"}


def test_a_test_that_is_none_is_named(model: Path) -> None:
    with spoken_to() as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        asked = {"op": "time_decoder", "kind": "tg", "tokens": 1, "depth": 0, "seed": 0}
        assert "memory" in ask(worker, load(model))
        assert ask(worker, asked | {"kind": "xx"})["error"] == "kind must be pp or tg, not 'xx'"
        assert "tokens >= 1" in ask(worker, asked | {"tokens": 0})["error"]
        assert "not fit the context" in ask(worker, asked | {"tokens": 65})["error"]
        assert "no such" in ask(worker, load(Path("none.gguf")))["error"].lower()
        assert ask(worker, asked)["error"] == "no decoder is loaded"  # released before


def test_a_death_in_the_middle_closes_stdout(model: Path) -> None:
    with spoken_to() as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdout.readline()
        assert ask(worker, load(model, context=2048))["context"] == 2048
        asked = {"op": "time_decoder", "kind": "tg", "tokens": 2000, "depth": 0, "seed": 0}
        worker.stdin.write(json.dumps(asked) + "\n")
        worker.stdin.flush()
        worker.send_signal(signal.SIGTERM)
        assert worker.stdout.readline() == ""
        assert worker.wait(60) == -signal.SIGTERM


def test_what_libraries_print_does_not_reach_the_replies() -> None:
    program = (
        "import os; from edgekit.runtime.bench.worker import claim_stdout\n"
        "replies = claim_stdout(); os.write(1, b'chatter'); replies.write('reply')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"reply", b"chatter")


def test_memory_does_not_shrink_in_its_peak() -> None:
    use = MemoryUse()
    first = use.read()
    held = bytearray(64 << 20)
    second = use.read()
    del held
    assert first["bytes"] and first["peak_bytes"] and second["peak_bytes"]
    assert second["peak_bytes"] - first["bytes"] > 32 << 20
    assert use.read()["peak_bytes"] == second["peak_bytes"]


def test_a_damaged_model_file_is_one_error(tmp_path: Path) -> None:
    damaged = tmp_path / "model.pte"
    damaged.write_bytes(b"\0" * 100)
    with (
        worker_processes(["my-model"]) as (worker,),
        pytest.raises(EdgekitError, match="^my-model: loading the model: .*model.pte"),
    ):
        worker.load_decoder("executorch", str(damaged), threads=1, context=None)


def test_a_worker_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        worker_processes(["my-model"]) as (worker,),
        pytest.raises(EdgekitError, match="^my-model: .* status 1: ImportError: numpy is broken$"),
    ):
        worker.load_decoder("executorch", "model.pte", threads=1, context=None)


SHELL = """
echo '{"protocol": 1, "runner": "sh 5.2", "ops": OPS, "engines": {"decoder": ["gguf"]}, "new": 1}'
while read -r line; do
  case $line in
  *bandwidth*) echo '{"gb_per_s": 8, "kernel": "dd", "threads": 1, "buffer_bytes": 80,
    "samples_ns": {"dd": [10]}, "memory": {"bytes": null, "peak_bytes": null}}' ;;
  *load_decoder*) echo '{"engine": "gguf", "version": "b1", "context": 64, "affinity": [7],
    "threads": {"prompt": 4, "decode": 2}, "import_ns": 0, "load_ns": 2000000,
    "memory": {"bytes": 3000000, "peak_bytes": 5000000}}' ;;
  *'"pp"'*) echo '{"elapsed_ns": 4000000, "token_ns": [], "first_token_ns": 5000000,
    "interference": {"own": 1, "other": null}, "memory": {"bytes": 9, "peak_bytes": 6000000}}' ;;
  *'"tokens": 1,'*) echo '{"elapsed_ns": 1, "token_ns": [1], "interference": {"own": 1},
    "memory": {}}' ;;
  *) echo '{"elapsed_ns": 30, "token_ns": [10, 20], "interference": {"own": 0.5}, "memory": {}}' ;;
  esac | tr -d '\\n'
  echo
done
"""


class OtherRunner(LocalHost):
    """A machine that has no Python, but a runner of its own."""

    name = "a phone"

    def __init__(self, place: Path, script: str) -> None:
        super().__init__()
        (place / "runner").write_text(script)
        self.python = Interpreter(("sh", str(place / "runner")), "0")


def test_a_runner_need_not_be_python(tmp_path: Path, model: Path) -> None:
    host = OtherRunner(tmp_path, SHELL.replace("OPS", json.dumps(OPS[:3])))
    record = bench([model], (8,), (2,), repetitions=2, host=host)
    artifact = record.artifacts[0]
    assert (artifact.engine_version, artifact.affinity, artifact.context) == ("b1", (7,), 64)
    assert (artifact.memory.peak, artifact.memory.before_load) == (6_000_000, None)
    assert artifact.threads is not None and artifact.threads.decode == 2
    assert [test.rates for test in artifact.tests] == [[2000.0] * 2, [2e9 / 30] * 2]
    assert record.bandwidth is not None and record.bandwidth.limit == 8.0
    assert artifact.tests[1].samples[0].interference.own == 0.5


INSTEAD = "of the worker's protocol, this edgekit 1: install the same edgekit on both sides"
NOT_AS_SAID = "m: the runner answered the first line not as protocol 1 says"


def test_the_page_of_the_protocol_names_what_is_said(model: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/worker-protocol.md").read_text()
    network = {"op": "time_network", "inputs": [], "seed": 0, "runs": 1, "at_least_ns": 0}
    decoder = {"op": "time_decoder", "kind": "tg", "tokens": 1, "depth": 0, "seed": 0}
    with spoken_to() as worker:
        assert worker.stdout is not None
        hello = json.loads(worker.stdout.readline())
        asked = [load(model), decoder, network, {"op": "bandwidth", "threads": 1}]
        said = [hello, *asked, *(ask(worker, request) for request in asked)]
    keys = {key for line in said for key in line} | {*said[-4]["memory"], *hello["engines"]}
    assert {key for key in keys if f"`{key}`" not in page} == {"op", "error"}
    assert {op for op in hello["ops"] if f"`{op}`" not in page} == set()


def one_line(caught: pytest.ExceptionInfo[EdgekitError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (
            '{"protocol": 2, "runner": "edgekit 9.0"}',
            f"m: edgekit 9.0 speaks version 2 {INSTEAD}",
        ),
        (
            "{}",
            f"m: the runner speaks version None {INSTEAD}",
        ),
        (
            '{"protocol": 1, "runner": "r", "ops": [], "engines": {}}',
            "m: tg4: r cannot time_decoder: it knows nothing",
        ),
        (
            '{"protocol": 1, "runner": "r", "ops": "all"}',
            f"{NOT_AS_SAID}: ops must be a list, got 'all'",
        ),
        (
            "Permission denied",
            "m: tg4: the runner answered with what is no JSON object: 'Permission denied'",
        ),
    ],
)
def test_a_runner_of_another_kind_is_refused_in_one_line(
    tmp_path: Path, said: str, error: str
) -> None:
    host = OtherRunner(tmp_path, f"echo '{said}'\nread -r line\n")
    with worker_processes(["m"], host) as (worker,), pytest.raises(EdgekitError) as caught:
        worker.time_decoder(Shape("tg", 4), seed=0)
    assert one_line(caught) == error


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("{}", "memory must be an object, got None"),
        ('{"memory": {}}', "elapsed_ns must be an integer, got None"),
        (
            '{"memory": {}, "elapsed_ns": 1, "token_ns": [1.5]}',
            "token_ns must hold whole numbers, got 1.5",
        ),
        (
            '{"memory": {}, "elapsed_ns": 1, "token_ns": [1], "interference": {"own": "all"}}',
            "own must be a number, got 'all'",
        ),
    ],
)
def test_an_answer_that_is_not_as_the_protocol_says_is_one_line(
    tmp_path: Path, reply: str, error: str
) -> None:
    hello = '{"protocol": 1, "runner": "r", "ops": ["time_decoder"], "engines": {}}'
    host = OtherRunner(tmp_path, f"echo '{hello}'\nread -r line\necho '{reply}'\nread -r line\n")
    with worker_processes(["m"], host) as (worker,), pytest.raises(EngineCrash) as caught:
        worker.time_decoder(Shape("tg", 4), seed=0)
    said = f"m: the runner answered time_decoder not as protocol {PROTOCOL} says: {error}"
    assert one_line(caught) == said


def test_an_engine_that_the_runner_has_not_is_named(tmp_path: Path) -> None:
    able = '"ops": ["load_decoder"], "engines": {"decoder": ["x"]}'
    hello = f'{{"protocol": 1, "runner": "r 1", {able}}}'
    host = OtherRunner(tmp_path, f"echo '{hello}'\nread -r line\n")
    with worker_processes(["m"], host) as (worker,):
        with pytest.raises(EdgekitError) as caught:
            worker.load_decoder("gguf", "m.gguf", None, None)
        assert one_line(caught) == "m: r 1 runs no decoder in gguf: it knows x"
        with pytest.raises(EdgekitError) as caught:
            worker.load_network("onnx", "m.onnx", None)
        assert one_line(caught) == "m: r 1 runs no network in onnx: it knows no engine"


def test_a_machine_without_python_is_named(tmp_path: Path) -> None:
    host = LocalHost()
    host.python = None
    with pytest.raises(EdgekitError, match="^this machine has no Python with edgekit"):
        WorkerProcess("m", host)


class Dead:
    """A process that is over."""

    def __init__(self, end: End) -> None:
        self._end = end

    def send(self, line: str) -> None:
        raise AssertionError("nothing can be asked of it")

    def receive(self) -> str | None:
        return None

    def wait(self) -> End:
        return self._end

    def kill(self) -> None:
        pass


class Morgue(LocalHost):
    """A machine on which every process ends in one way."""

    def __init__(self, end: End) -> None:
        super().__init__()
        self._end = end

    def start(self, command: object) -> Dead:
        return Dead(self._end)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (End(-15, ""), "the engine's process was ended by SIGTERM; something outside edgekit"),
        (End(-4, "so"), "the engine's process was ended by SIGILL: so; the model file may be"),
        (End(255, "no route"), "the engine's process ended with status 255: no route"),
        (End(None, ""), "the engine's process was lost: no message"),
    ],
)
def test_how_a_process_ended_is_told(end: End, error: str) -> None:
    with worker_processes(["m"], Morgue(end)) as (worker,), pytest.raises(EngineCrash) as caught:
        worker.time_decoder(Shape("tg", 4), seed=0)
    assert one_line(caught).startswith(f"m: tg4: {error}")


def test_a_machine_that_was_started_anew_is_not_measured(tmp_path: Path, model: Path) -> None:
    host = OtherRunner(tmp_path, SHELL.replace("OPS", json.dumps(OPS)))
    starts = iter([b"one", b"two"])
    read = host.read

    class Restarted(OtherRunner):
        def read(self, path: str) -> bytes | None:
            return next(starts) if path.endswith("boot_id") else read(path)

    host = Restarted(tmp_path, SHELL.replace("OPS", json.dumps(OPS)))
    with pytest.raises(EdgekitError, match="^a phone was started anew in the middle"):
        bench([model], (8,), (0,), repetitions=1, host=host)
