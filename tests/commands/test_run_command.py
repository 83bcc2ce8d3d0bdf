"""`edgekit run` on the bundled model's artifact: in process, in a pipe and in a terminal."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.command_line import assert_only_one_line

from edgekit.cli import main

PROMPT = "Once upon a time"
# Nearly uniform draws: text that does not end before the test is done with it.
ENDLESS = ("--raw", "--temperature", "50", "--min-p", "0", "--seed", "1")


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments)], input=stdin)


def run_json(*arguments: object) -> dict[str, Any]:
    """Return the last line; those before it are the pieces of its text."""
    done = run(*arguments, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    *pieces, facts = map(json.loads, done.stdout.splitlines())
    assert all(set(piece) == {"piece"} and piece["piece"] for piece in pieces)
    assert "".join(piece["piece"] for piece in pieces) == facts["text"]
    assert isinstance(facts, dict)
    return facts


@contextmanager
def started(
    *arguments: object, stdin: int | None = None, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A real process, killed after two minutes so that a hang is a failure and not a wait."""
    command = [sys.executable, "-m", "edgekit", "run", *map(str, arguments)]
    with subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE) as process:
        watchdog = Timer(120, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def test_text_on_stdout_and_figures_on_stderr(tiny_artifact: Path) -> None:
    done = run(tiny_artifact, PROMPT, "-n", 12, "--temp", 0)
    assert done.exit_code == 0
    assert len(done.stdout) > 1
    assert done.stdout.endswith("\n")
    assert "tok/s" in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_has_a_line_for_every_piece(tiny_artifact: Path) -> None:
    done = run(tiny_artifact, PROMPT, "-n", 12, "--raw", "--temp", 0, "--json")
    assert len(done.stdout.splitlines()) > 8


@pytest.mark.slow
def test_json_arrives_while_the_text_is_made(tiny_artifact: Path) -> None:
    with started(tiny_artifact, PROMPT, *ENDLESS, "--json", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert set(json.loads(process.stdout.readline())) == {"piece"}
        assert process.poll() is None, "the text has no end before the context's"


def test_json_holds_the_streamed_text(tiny_artifact: Path) -> None:
    options = (tiny_artifact, PROMPT, "-n", 12, "--seed", 5, "--raw")
    facts = run_json(*options)
    assert run(*options).stdout == facts["text"] + "\n"
    assert facts["seed"] == 5
    assert facts["engine"] == "executorch"
    assert facts["generated_tokens"] <= 12
    assert facts["reason"] in {"length", "eos"}


def test_the_chat_template_is_on_unless_raw(tiny_artifact: Path) -> None:
    templated = run_json(tiny_artifact, PROMPT, "-n", 1)
    raw = run_json(tiny_artifact, PROMPT, "-n", 1, "--raw")
    advised = run_json(tiny_artifact, PROMPT, "-n", 1, "--system", "Be kind.")
    assert raw["prompt_tokens"] < templated["prompt_tokens"] < advised["prompt_tokens"]


def test_a_seed_repeats_the_text_and_another_changes_it(tiny_artifact: Path) -> None:
    texts = [
        run_json(tiny_artifact, PROMPT, "-n", 24, "--temp", 2, "--min-p", 0, "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text(tiny_artifact: Path) -> None:
    options = (tiny_artifact, PROMPT, "--raw", "--temp", 0, "-n", 24)
    whole = run_json(*options)["text"]
    stop = whole[8:11]
    cut = run_json(*options, "--stop", "never there", "--stop", stop)
    assert cut["reason"] == "stop"
    assert cut["text"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("dash", [(), ("-",)])
def test_the_prompt_comes_from_standard_input(tiny_artifact: Path, dash: tuple[str, ...]) -> None:
    options = ("-n", 8, "--temp", 0)
    piped = run(tiny_artifact, *dash, *options, stdin=f"{PROMPT}\n".encode())
    assert piped.stdout == run(tiny_artifact, PROMPT, *options).stdout


def test_standard_input_that_is_not_utf8(tiny_artifact: Path) -> None:
    assert_only_one_line(
        run(tiny_artifact, stdin=b"Gr\xfc\xdfe"), "standard input is not UTF-8: byte 0xfc at offset"
    )


def test_an_empty_prompt(tiny_artifact: Path) -> None:
    assert_only_one_line(run(tiny_artifact, stdin=b"\n"), "the prompt is empty")


def test_a_prompt_longer_than_the_context(tiny_artifact: Path) -> None:
    context = json.loads((tiny_artifact / "edgekit.json").read_text())["context"]
    done = run(tiny_artifact, "-", stdin=b"zebra " * context)
    assert_only_one_line(
        done, "edgekit: prompt of ", f" tokens does not fit the context of {context}"
    )


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_prompt_is_not_tokenized_that_cannot_fit(
    tiny_artifact: Path, raw: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.models.tokenizer.Tokenizer.encode", None)
    text = b"a" * (256 * 512 + 1)
    for done in (
        run(tiny_artifact, *raw, stdin=text),
        run(tiny_artifact, text.decode(), *raw),
        run(tiny_artifact, "x", "--system", text.decode()),
    ):
        words = "edgekit: a prompt of more than 131,072 bytes does not fit the context of 512"
        assert_only_one_line(done, words)


def test_standard_input_is_read_no_further_than_could_fit(tiny_artifact: Path) -> None:
    with started(tiny_artifact, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        with pytest.raises(BrokenPipeError):  # nobody reads on
            while True:
                process.stdin.write(b"a" * (1 << 16))
        assert b"does not fit the context of 512\n" in process.stderr.read()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names must be UTF-8")
def test_a_folder_whose_name_is_not_utf8(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    facts = run_json(folder, PROMPT, "-n", 2)
    assert facts["artifact"].endswith("\udcff")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--temperature", "-1", "temperature must be 0 (greedy) or more, not -1.0"),
        ("--top-k", "-1", "top-k must be"),
        ("--top-p", "0", "top-p must be"),
        ("--min-p", "2", "min-p must be"),
        ("--repeat-penalty", "0", "repeat-penalty must be"),
        ("--seed", "-1", "seed must be"),
        ("--max-tokens", "0", "max-tokens must be at least 1, not 0"),
        ("--repeat-penalty", "1e-300", "repeat-penalty must be 0.01 to 100; 1 is off, not 1e-300"),
        ("--threads", "0", "threads must be at least 1, not 0"),
        ("--threads", "100000", "threads must be at most "),
        ("--threads", "2147483648", "threads must be at most "),
        ("--stop", "", "a stop string must not be empty"),
    ],
)
def test_settings_out_of_range(tiny_artifact: Path, option: str, value: str, words: str) -> None:
    assert_only_one_line(run(tiny_artifact, PROMPT, option, value), words)


def test_an_artifact_that_is_not_there(tmp_path: Path) -> None:
    assert_only_one_line(run(tmp_path / "none", PROMPT), "none")


@pytest.mark.parametrize("name", ["model.pte", "edgekit.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_artifact_is_one_line(
    tiny_artifact: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2] if damage == "cut" else b"PK\3\4" * 40)
    assert_only_one_line(run(folder, PROMPT), name)


def test_a_closed_pipe_ends_in_silence(tiny_artifact: Path) -> None:
    with started(tiny_artifact, PROMPT, *ENDLESS, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_ends_the_line_with_status_130(tiny_artifact: Path) -> None:
    with started(tiny_artifact, PROMPT, *ENDLESS, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate()
        assert process.returncode == 130
        assert (first + rest).endswith(b"\n")
        assert errors == b""


@pytest.mark.slow
def test_a_chat_in_a_terminal(tiny_artifact: Path, terminal: tuple[int, int]) -> None:
    keyboard, screen = terminal
    with started(tiny_artifact, *("-n", 8), stdin=screen, stdout=screen) as process:
        assert process.stderr is not None
        assert b"/exit ends it" in process.stderr.readline()
        os.write(keyboard, b"Tell me a story\n")
        assert b"tok/s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"Ctrl-D or /exit ends the chat\n"
        os.write(keyboard, b"/exit\n")
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--raw", "--json"])
def test_a_chat_takes_no_flag_of_a_single_answer(
    tiny_artifact: Path, terminal: tuple[int, int], flag: str
) -> None:
    with started(tiny_artifact, flag, stdin=terminal[1]) as process:
        errors = process.communicate()[1].decode()
        assert process.returncode == 2
        assert errors == f"edgekit: {flag} needs a PROMPT (or text on standard input)\n"


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a pseudo-terminal: the user's and the program's."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)
