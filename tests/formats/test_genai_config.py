"""genai_config.json: what onnxruntime-genai's builder writes is read, the rest refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import EdgekitError
from edgekit.formats.onnx.genai_config import CONFIG, GenaiConfig, is_genai_folder


def genai(**decoder: object) -> dict[str, Any]:
    """The parts of a built LFM2's configuration that matter here."""
    inputs = {"input_ids": "input_ids", "past_conv_names": "past.%d.conv"}
    given = {"filename": "model.onnx", "head_size": 64, "inputs": inputs, "outputs": {}}
    return {
        "model": {
            "bos_token_id": 1,
            "context_length": 128_000,
            "decoder": given | decoder,
            "eos_token_id": 7,
            "type": "lfm2",
            "vocab_size": 65_536,
        },
        "search": {"max_length": 4096, "do_sample": False},
    }


def write(folder: Path, config: object) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / CONFIG).write_text(text)
    (folder / "model.onnx").touch()
    return folder


def test_what_the_builder_writes_is_read(tmp_path: Path) -> None:
    config = GenaiConfig.open(write(tmp_path, genai()))
    assert config.model_path == tmp_path / "model.onnx"
    assert (config.context, config.vocab_size, config.head_size) == (4096, 65_536, 64)
    assert (config.bos_id, config.eos_ids) == (1, (7,))
    assert config.inputs == {"input_ids": "input_ids", "past_conv_names": "past.%d.conv"}
    assert config.outputs == {}


def test_several_ends_of_text(tmp_path: Path) -> None:
    config = genai()
    config["model"]["eos_token_id"] = [2, 7]
    assert GenaiConfig.open(write(tmp_path, config)).eos_ids == (2, 7)


def test_what_is_left_out_is_none(tmp_path: Path) -> None:
    bare = {"model": {"decoder": {"filename": "model.onnx"}}}
    config = GenaiConfig.open(write(tmp_path, bare))
    assert (config.context, config.bos_id, config.eos_ids, config.inputs) == (None, None, (), {})


def test_a_folder_is_known_by_its_configuration(tmp_path: Path) -> None:
    assert not is_genai_folder(tmp_path)
    assert not is_genai_folder(tmp_path / "absent")
    assert is_genai_folder(write(tmp_path, genai()))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("9" * 5000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        (" " * (1 << 20) + "{}", "is too large to be a configuration"),
        ("[]", "must hold objects, got"),
        ({"model": []}, "must hold objects, got"),
        ({}, "filename must be a string, got None"),
        (genai(filename=7), "filename must be a string, got 7"),
        (genai(filename="../model.onnx"), "filename '../model.onnx' is no plain name"),
        (genai(filename="/etc/passwd"), "filename '/etc/passwd' is no plain name"),
        (genai(filename=".."), "is no plain name of a file"),
        (genai(filename="other.onnx"), "other.onnx: is missing, though genai_config.json names it"),
        (genai(head_size="64"), "head_size must be an integer of 1 to"),
        (genai(head_size=0), "head_size must be an integer of 1 to"),
        (genai(head_size=True), "head_size must be an integer of 1 to"),
        (genai(head_size=1e9), "head_size must be an integer of 1 to"),
        (genai(inputs={"past_conv_names": 3}), "past_conv_names must be a string, got 3"),
        (genai(inputs=[]), "must hold objects, got"),
        (
            {"model": genai()["model"] | {"bos_token_id": 1 << 20}},
            "must be below its vocab_size 65536, got 1048576",
        ),
        (
            {"model": genai()["model"] | {"eos_token_id": [7, 65_536]}},
            "must be below its vocab_size",
        ),
        (genai() | {"search": {"max_length": -1}}, "max_length must be an integer of 1 to"),
    ],
)
def test_unsound_configurations_are_refused(tmp_path: Path, config: object, words: str) -> None:
    if isinstance(config, str) and config == "\udcff":
        (tmp_path / CONFIG).write_bytes(b"\xff\xfe{}")
    else:
        write(tmp_path, config)
    with pytest.raises(EdgekitError, match=words) as caught:
        GenaiConfig.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_absent_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="genai_config.json: cannot be read: No such file"):
        GenaiConfig.open(tmp_path)
