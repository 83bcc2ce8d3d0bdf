"""Shapes that an engine does not run: refused before any work, naming what does run them."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import assert_only_one_line, run

RAW: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 7,
    "max_position_embeddings": 128,
}
HEADS_OF_8 = {"num_attention_heads": 8}
HEADS_OF_24 = {"hidden_size": 96}


def folder(place: Path, **changes: object) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(RAW | changes))
    return place


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        (
            {"layer_types": ["conv"] * 2},
            ["gguf"],
            "layer_types are all of convolution; llama.cpp's lfm2 has",
        ),
        (
            {"layer_types": ["full_attention"]},
            ["gguf", "--scheme", "Q4_K_M"],
            "layer_types are all of attention; llama.cpp's lfm2 has",
        ),
        (
            {"layer_types": ["conv", "full_attention"] * 257},
            ["gguf"],
            "num_hidden_layers is 514; llama.cpp takes up to 512: give target executorch or onnx",
        ),
        (
            {"head_dim": 32},
            ["gguf"],
            "as the model is wide, 64 (heads times head_dim): give target",
        ),
        (HEADS_OF_8, ["onnx"], "head_dim is 8; ONNX Runtime's GroupQueryAttention rotates heads"),
        (HEADS_OF_24, ["onnx"], "multiples of 16: give --portable, or another target"),
        (HEADS_OF_24, ["onnx", "--abi", "transformersjs"], "head_dim is 24"),
        ({"head_dim": 7}, ["onnx"], "head_dim 7 is odd"),
        ({"num_key_value_heads": 3}, ["gguf"], "4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, ["gguf"], "num_key_value_heads must lie between 1 and"),
        ({"layer_types": []}, ["executorch"], "number of layers must lie between 1 and 1024"),
        ({"hidden_size": 1 << 40}, ["executorch"], "hidden_size must lie between 1 and"),
        ({"vocab_size": 10**30}, ["executorch"], "vocab_size must lie between 1 and"),
        ({"vocab_size": 1}, ["executorch"], "_token_id"),
        ({"conv_L_cache": 1}, ["executorch"], "conv_L_cache must lie between 2 and 64"),
        (
            {"model_type": "foo"},
            ["onnx"],
            "'foo' is not supported; supported: lfm2, llama, qwen3, dense text models",
        ),
        (
            {"model_type": "foo"},
            ["gguf"],
            "Of others a torch module can be exported: edgekit export FILE.py",
        ),
    ],
)
def test_what_an_engine_does_not_run(
    tmp_path: Path, changes: dict[str, object], target: list[str], words: str, dry: bool
) -> None:
    model = folder(tmp_path / "model", **changes)
    arguments = ["export", model, "--random-weights", "-o", tmp_path / "out", "--target", *target]
    assert_only_one_line(run(*arguments, *(["--dry-run"] if dry else [])), "model", words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        (HEADS_OF_8, ["onnx", "--portable"]),
        (HEADS_OF_24, ["onnx", "--portable", "--abi", "transformersjs"]),
        (HEADS_OF_8 | {"layer_types": ["conv"]}, ["onnx"]),  # nothing to rotate
        ({"layer_types": ["full_attention"]}, ["onnx"]),
        ({"conv_L_cache": 4, "vocab_size": 8}, ["onnx"]),
        (HEADS_OF_24 | {"conv_L_cache": 2}, ["gguf"]),
    ],
)
def test_what_is_named_instead_works(
    tmp_path: Path, changes: dict[str, object], target: list[str]
) -> None:
    """The file is verified in its engine."""
    pytest.importorskip("llama_cpp" if target == ["gguf"] else "onnxruntime")
    model = folder(tmp_path / "model", **changes)
    arguments = ["export", model, "--random-weights", "-o", tmp_path / "out", "--context", 32]
    done = run(*arguments, "--target", *target, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["verified"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"layer_types": ["conv"]}, HEADS_OF_8, HEADS_OF_24])
def test_executorch_takes_all_of_them(tmp_path: Path, changes: dict[str, object]) -> None:
    model = folder(tmp_path / "model", **changes)
    arguments = ["export", model, "--random-weights", "-o", tmp_path / "out", "--context", 32]
    done = run(*arguments, "--target", "executorch", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["verified"]
