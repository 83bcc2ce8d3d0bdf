"""`edgekit.fit`, and what it says of each target."""

import json

import pytest
from click.testing import CliRunner
from support.command_line import assert_only_one_line

import edgekit
from edgekit.cli import main


@pytest.mark.parametrize("target", ["executorch", "gguf", "onnx"])
def test_the_function_and_the_command_say_the_same(target: str) -> None:
    words = ["fit", "lfm2-1.2b", "--device", "raspberry-pi-5", "--int4", "--target", target]
    printed = CliRunner().invoke(main, [*words, "--json"])
    found = edgekit.fit("lfm2-1.2b", device="pi5", recipe="int4", target=target)
    assert json.loads(printed.stdout) == json.loads(json.dumps(found.to_dict()))
    assert CliRunner().invoke(main, words).stdout == f"{found.text()}\n"
    assert found.target == target


def test_a_target_counts_its_own_file_and_its_engines_memory() -> None:
    """A GGUF's int8 has a scale for 32 weights, its engine no second copy, a cache of 16 bits."""
    ours, llama = (
        edgekit.fit("lfm2-350m", device="pi5", target=target).memory
        for target in ("executorch", "gguf")
    )
    assert llama.file_bytes > ours.file_bytes
    assert llama.packed_bytes == 0 < ours.packed_bytes
    assert 2 * llama.kv_cache_bytes == ours.kv_cache_bytes


def test_what_is_given_stands_instead_of_what_is_known() -> None:
    found = edgekit.fit("lfm2-tiny", measure=False, ram_bytes=1 << 30, bandwidth=10.0)
    assert found.ram_bytes == (1 << 30,)
    assert found.bandwidth == (10.0, "given")
    assert found.decode_ceiling == found.memory.decode_ceiling(10.0)
    assert edgekit.fit("lfm2-tiny", measure=False).decode_ceiling is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--target", "tflite"), ("unknown target 'tflite'", "executorch, gguf, onnx")),
        (("--target", "executorch", "--scheme", "w4g32a"), ("w4g32a", "executorch")),
        (("--device", "abacus"), ("abacus",)),
    ],
)
def test_what_a_target_cannot_hold_is_refused(
    more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_only_one_line(CliRunner().invoke(main, ["fit", "lfm2-tiny", *more]), *words)
