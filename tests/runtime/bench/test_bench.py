"""The benchmark on a real artifact: what runs in which order, and how it fails."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.foreign_gguf import write_foreign_gguf

from edgekit.cli import main
from edgekit.devices.cpus import default_threads
from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits
from edgekit.runtime.bench.decoder import DecoderResult, bench, plan
from edgekit.runtime.bench.record import Record
from edgekit.runtime.bench.tables import render
from edgekit.runtime.bench.worker import measure, random_tokens
from edgekit.runtime.decode_bytes import Shape
from edgekit.runtime.engines.engine import OneSequenceEngine, Threads, TokenIds

FAR_TOO_MANY = str(10**6)
HUGE = ["9" * 5000, "9" * 400, str(2**63), "-1", ""]


def children() -> set[int]:
    """Return the process ids of this process's children."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def one_line_error(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    lines: list[str] = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


class EchoEngine(OneSequenceEngine):
    """The smallest engine: keeps every run of tokens it was given."""

    name, version, context, vocab_size = "echo", "1", 64, 50
    longest_chunk = default_chunk = 64
    threads = Threads(1, 1)

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, list[int]]] = []

    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        self.given.append((position, tokens.tolist()))
        return np.zeros(self.vocab_size, dtype=np.float32)


class ForgetfulEngine(EchoEngine):
    """Loses a token of every run."""

    @property
    def position(self) -> int:
        return super().position - 1


def test_plan_runs_prefills_then_decodes_at_each_depth() -> None:
    shapes = plan((8, 0, 8, 16), (4,), (0, 2))
    assert [shape.name for shape in shapes] == [
        "pp8",
        "pp16",
        "tg4",
        "pp8 @ d2",
        "pp16 @ d2",
        "tg4 @ d2",
    ]


def test_plan_refuses_to_measure_nothing() -> None:
    with pytest.raises(EdgekitError, match="nothing to measure"):
        plan((0,), (0,), (0,))


def test_random_tokens_are_seeded_and_in_the_vocabulary() -> None:
    tokens = random_tokens(50, 1000, seed=3)
    assert tokens == random_tokens(50, 1000, seed=3)
    assert tokens != random_tokens(50, 1000, seed=4)
    assert set(tokens) == set(range(50))


def test_a_prefill_fills_the_depth_then_runs_the_prompt_in_one_piece() -> None:
    engine = EchoEngine()
    reply = measure(engine, Shape("pp", 6, depth=3), seed=1)
    tokens = random_tokens(50, 9, seed=1)
    assert engine.given == [(0, tokens[:3]), (3, tokens[3:])]
    assert reply["first_token_ns"] >= reply["elapsed_ns"] > 0
    assert reply["token_ns"] == []


def test_a_decode_runs_token_by_token_on_a_fresh_state() -> None:
    engine = EchoEngine()
    measure(engine, Shape("pp", 20), seed=1)
    engine.given.clear()
    reply = measure(engine, Shape("tg", 4, depth=2), seed=1)
    tokens = random_tokens(50, 6, seed=1)
    alone = [(2 + i, [token]) for i, token in enumerate(tokens[2:])]
    assert engine.given == [(0, tokens[:2]), *alone]
    assert len(reply["token_ns"]) == 4
    assert sum(reply["token_ns"]) == reply["elapsed_ns"]
    assert reply["first_token_ns"] is None


def test_an_engine_that_loses_tokens_fails_the_run() -> None:
    with pytest.raises(EdgekitError, match="tg4: the engine stands at position 3, not 4"):
        measure(ForgetfulEngine(), Shape("tg", 4), seed=1)


@pytest.fixture(scope="module")
def run(tiny_artifact: Path) -> tuple[Record[DecoderResult], list[tuple[int, int]]]:
    """Measure one artifact against itself: two processes, four tests, two repetitions."""
    before = children()
    progress: list[tuple[int, int]] = []
    record = bench(
        [tiny_artifact, tiny_artifact],
        prompts=(8,),
        generates=(4,),
        depths=(0, 5),
        repetitions=2,
        threads=1,
        progress=lambda done, total, label: progress.append((done, total)),
    )
    assert children() == before, "a worker was left behind"
    return record, progress


@pytest.fixture(scope="module")
def record(run: tuple[Record[DecoderResult], list[tuple[int, int]]]) -> Record[DecoderResult]:
    return run[0]


def test_progress_counts_every_repetition_and_warm_up(
    run: tuple[Record[DecoderResult], list[tuple[int, int]]],
) -> None:
    steps = 4 * 2 * (2 + 1)
    assert run[1][1:] == [(done, steps) for done in range(steps + 1)]


def test_the_record_prints_as_tables(record: Record[DecoderResult]) -> None:
    printed = render(record).splitlines()
    for artifact in record.artifacts:
        for test in ("pp8", "tg4", "pp8 @ d5", "tg4 @ d5"):
            assert any(line.startswith(f"| {artifact.name} | {test} ") for line in printed)


def test_repetitions_of_the_artifacts_alternate(record: Record[DecoderResult]) -> None:
    first, second = (artifact.name for artifact in record.artifacts)
    assert first != second
    assert record.sequence() == [
        (name, test)
        for test in ("pp8", "tg4", "pp8 @ d5", "tg4 @ d5")
        for _ in range(2)
        for name in (first, second)
    ]


def test_every_decoded_token_is_timed(record: Record[DecoderResult]) -> None:
    for artifact in record.artifacts:
        for test in artifact.tests:
            assert len(test.samples) == 2
            wanted = 4 if test.shape.kind == "tg" else 0
            assert [len(sample.each_ns) for sample in test.samples] == [wanted, wanted]


def test_each_artifact_has_its_own_engine_load_and_memory(
    record: Record[DecoderResult], tiny_artifact: Path
) -> None:
    manifest = json.loads((tiny_artifact / "edgekit.json").read_text())
    for artifact in record.artifacts:
        assert artifact.engine == manifest["target"] == "executorch"
        assert artifact.model["sha256"] == manifest["model"]["sha256"]
        assert artifact.load_ns is not None and artifact.load_ns > 0
        assert artifact.memory.peak is not None
        assert artifact.memory.before_load is not None
        assert artifact.memory.peak > artifact.memory.before_load
        assert sum(count["bytes"] for count in artifact.schemes.values()) == sum(
            row["bytes"] for row in manifest["tensors"]
        )
        assert artifact.traffic is not None
        assert 0 < artifact.traffic.weight_bytes < artifact.file_bytes


def test_the_record_says_on_what_and_under_which_conditions(record: Record[DecoderResult]) -> None:
    written = json.loads(record.to_json())
    assert written["machine"]["cpu"]
    assert written["settings"]["threads"] == written["bandwidth"]["before"]["threads"] == 1
    assert written["bandwidth"]["limit_gb_per_s"] > 0
    assert written["timestamp_utc"].endswith("+00:00")
    sample = written["artifacts"][0]["tests"][0]["samples"][0]
    assert sample["conditions_before"]["load_average"] is not None
    assert {gate["name"] for gate in sample["gates"]} == {"temperature", "swap_growth_bytes"}
    assert len(written["ratios"]) == 4


@pytest.mark.parametrize("asked", [None, 2])
def test_without_a_number_of_threads_the_engine_chooses_as_in_run(
    tmp_path: Path, asked: int | None
) -> None:
    path = write_foreign_gguf(tmp_path / "small.gguf", "Q8_0")
    record = bench([path], (4,), (4,), repetitions=1, threads=asked)
    count = default_threads()
    wanted = Threads(count, 1) if asked is None else Threads(asked, asked)
    assert record.artifacts[0].threads == wanted
    assert record.settings.threads == wanted.prompt
    notes = [line for line in render(record).splitlines() if "for decoding" in line]
    said = ["small.gguf: 1 thread for decoding: a token's weights are 6.5 MB"]
    assert notes == (said if wanted.prompt > wanted.decode else [])


def test_a_killed_engine_is_one_error_and_ends_the_others(tiny_artifact: Path) -> None:
    before = children()

    def kill_one(done: int, total: int, label: str) -> None:
        if done == 2:
            os.kill(max(children() - before), signal.SIGKILL)

    with pytest.raises(EdgekitError, match=r"#\d: pp2: .* ended by SIGKILL .*memory runs out"):
        bench(
            [tiny_artifact, tiny_artifact],
            prompts=(2,),
            generates=(0,),
            threads=1,
            progress=kill_one,
        )
    assert children() == before


def test_an_interrupt_leaves_no_process(tiny_artifact: Path) -> None:
    arguments = ["bench", str(tiny_artifact), "-p", "4", "-n", "0", "-r", FAR_TOO_MANY, "-t", "1"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "edgekit", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    task = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: parent.poll() is not None or bool(task.read_text().split()))
    workers = [int(pid) for pid in task.read_text().split()]
    parent.send_signal(signal.SIGINT)
    stdout, stderr = parent.communicate(timeout=60)
    assert parent.returncode != 0
    assert stdout == ""
    assert "Traceback" not in stderr
    assert workers
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_command_prints_the_record_and_nothing_else(tiny_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    tests = ["-p", "4,6", "-n", "0", "-r", "1", "-t", "1"]
    result = CliRunner().invoke(
        main, ["bench", str(tiny_artifact), *tests, "--json", "-o", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    record = json.loads(result.stdout)
    assert [test["test"] for test in record["artifacts"][0]["tests"]] == ["pp4", "pp6"]
    assert json.loads(output.read_text()) == record


@pytest.mark.parametrize("option", ["-p", "-n", "-d"])
def test_a_test_beyond_the_context_is_one_error(tiny_artifact: Path, option: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(tiny_artifact), option, FAR_TOO_MANY])
    error = one_line_error(result)
    assert tiny_artifact.name in error
    assert "the artifact's context is" in error


def test_a_full_disk_behind_stdout_does_not_cost_the_record(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record: Record[DecoderResult]) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgekit.runtime.bench.tables.render", full)
    output = tmp_path / "record.json"
    tests = ["-p", "1", "-n", "0", "-r", "1", "-t", "1", "-o", str(output)]
    result = CliRunner().invoke(main, ["bench", str(tiny_artifact), *tests])
    assert one_line_error(result) == "edgekit: No space left on device"
    assert json.loads(output.read_text())["artifacts"]


def test_an_unknown_artifact_is_one_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path / "no-such-artifact")])
    assert "no-such-artifact" in one_line_error(result)


def test_an_existing_record_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    output.write_text("mine")
    result = CliRunner().invoke(main, ["bench", "some-artifact", "-o", str(output)])
    assert "--force" in one_line_error(result)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--cooldown", value] for value in ("nan", "inf", "-1", "1e309")),
        *([option, value] for option in ("-p", "-n", "-d", "-r") for value in HUGE),
        *(["-t", value] for value in ("0", "100000", "2147483648", "9" * 400)),
        ["--seed", "-1"],
    ],
)
def test_numbers_that_no_benchmark_can_have(arguments: list[str]) -> None:
    error = one_line_error(CliRunner().invoke(main, ["bench", "some-artifact", *arguments]))
    assert arguments[0].lstrip("-") in error or "threads" in error


@pytest.mark.parametrize("arguments", [["-p", "many"], ["-n", "1.5"], ["-d", "1,,2"], ["-r", "0"]])
def test_malformed_counts_are_refused_by_name(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["bench", "some-artifact", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
