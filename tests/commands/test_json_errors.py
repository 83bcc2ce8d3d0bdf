"""What a command with `--json` prints when it fails: the error, as JSON, in stdout's last line.

Crashes of native libraries are in test_crash.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import edgekit, run

from edgekit.cli import COMMANDS, DEFECT, INTERRUPTED
from edgekit.commands._flags import field_in
from edgekit.errors import EdgekitError, VerificationError

# A mistake that each command's library finds, and the field that it is about.
MISTAKES = {
    "export": (["lfm2-tiny", "--target", "tflite"], "target"),
    "verify": (["nowhere"], None),
    "run": (["nowhere", "hello"], None),
    "bench": (["nowhere"], None),
    "eval": (["nowhere", "--text", __file__], None),
    "compare": (["nowhere"], None),
    "inspect": (["lfm2-tiny", "--sensitivity", "--scheme", "w5"], "scheme"),
    "quantize": (["lfm2-tiny", "--bits", "5", "--int4"], "bits"),
    "imatrix": (["lfm2-tiny", "--text", __file__, "-o", str(Path(__file__).parent)], "output"),
    "fit": (["lfm2-tiny", "--device", "abacus"], "device"),
    "devices": (["abacus"], "device"),
}


def _error(*words: object, status: int) -> dict[str, Any]:
    """The error; stderr has the same in one line."""
    done = run(*words, "--json")
    assert done.exit_code == status, done.output
    error: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["error"]
    assert error["status"] == status
    assert done.stderr == f"edgekit: {error['message']}\n"
    return error


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_json_with_its_field(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    arguments, field = MISTAKES[name]
    assert _error(name, *arguments, status=2).get("field") == field


def test_every_command_that_can_be_given_a_mistake_is_there() -> None:
    assert {*MISTAKES, "models"} == {*COMMANDS}  # `models` takes nothing


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_json(name: str) -> None:
    error = _error(name, "--bogus", status=2)
    assert "No such option" in error["message"]
    assert "field" not in error


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["export", "lfm2-tiny"], "target"),
        (["export", "--target", "gguf"], "model"),
        (["eval", "nowhere", "--text", "a", "--chunks", "0"], "chunks"),
        (["compare", "nowhere", "-p", "many"], "prompt"),
        (["fit", "lfm2-tiny", "--ram", "much"], "ram_bytes"),
    ],
)
def test_what_click_refuses_is_json_with_its_field(arguments: list[str], field: str) -> None:
    assert _error(*arguments, status=2)["field"] == field


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (EdgekitError("`target_size` 0: too small"), 2, "--target-size 0: too small"),
        (VerificationError("differs"), 1, "differs"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (OSError(28, "No space left on device", "out"), 2, "out: No space left on device"),
        (MemoryError(), 2, "not enough memory"),
        (ValueError("a\nb"), DEFECT, "internal error: ValueError: a b"),
    ],
)
def test_each_kind_of_end_is_json(
    raised: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("edgekit.models.source.list_models", fail)
    assert said in _error("models", status=status)["message"]


def test_an_error_of_a_process_is_json() -> None:
    done = edgekit("run", "nowhere", "hello", "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["status"]) == (2, 2)
    assert done.stderr == f"edgekit: {error['message']}\n"


def test_without_json_stdout_stays_empty() -> None:
    for arguments in (["fit", "lfm2-tiny", "--device", "abacus"], ["run", "x", "--", "--json"]):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stdout == ""


def test_a_flag_in_a_command_to_give_is_not_the_field() -> None:
    assert field_in("make one: `edgekit export lfm2-tiny --target gguf`") is None
    assert field_in("lfm2-tiny: -n 9 needs 9 positions") == "generates"
    assert field_in("--bits 5 and --int4 exclude each other") == "bits"
