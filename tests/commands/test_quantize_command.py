"""`edgekit quantize`: the table, the file, and refusals, on a small model in a folder."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import command_line
from support.gguf_models import small_model

from edgekit.models.checkpoint import Checkpoint
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import load_quantized
from edgekit.quantize.tensor import QuantizedTensor

LINEAR = "model.layers.0.feed_forward.w2.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a random model of two layers, bfloat16."""
    return small_model(
        tmp_path / "small", tokenizer=False, vocab_size=96, intermediate_size=128, eos_token_id=2
    )


run = partial(command_line.run, "quantize")


@pytest.mark.parametrize("option", ["--int8", "--int4", "--float"])
def test_the_file_holds_what_the_table_says(model: Path, tmp_path: Path, option: str) -> None:
    out = tmp_path / "q.safetensors"
    result = run(model, option, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["file"] == str(out)
    assert record["model"] == {"id": "small", "revision": None}
    contents = load_quantized(out)
    assert {row["tensor"] for row in record["tensors"]} == set(contents)
    for row in record["tensors"]:
        value = contents[row["tensor"]]
        assert value.nbytes == row["bytes"], row["tensor"]
        assert list(value.shape) == row["shape"]
        assert (row["sqnr_db"] is not None) == isinstance(value, QuantizedTensor)
    assert contents[HEAD] is contents[EMBEDDING]
    assert record["bytes"] == sum(row["bytes"] for row in record["tensors"] if "same_as" not in row)
    with safe_open(out, framework="pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert stored == record["bytes"]


def test_the_codes_are_those_of_the_weights(model: Path, tmp_path: Path) -> None:
    assert run(model, "--int4", "-o", tmp_path / "q").exit_code == 0
    linear = load_quantized(tmp_path / "q")[LINEAR]
    assert isinstance(linear, QuantizedTensor)
    expected = quantize_weight(parse_scheme("w4g32"), Checkpoint.open(model).tensor(LINEAR))
    assert torch.equal(linear.codes, expected.codes)
    assert torch.equal(linear.scales, expected.scales)


def test_the_table_is_printed(model: Path, tmp_path: Path) -> None:
    result = run(model, "-o", tmp_path / "q.safetensors")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "scheme", "range", "shape", "bytes", "SQNR", "dB"]
    (row,) = [line.split() for line in lines if line.startswith(LINEAR)]
    assert row[1:5] == ["w8", "minmax", "64x128", "8,448"]
    assert 38 < float(row[5]) < 48
    assert lines[-1] == f"wrote {tmp_path / 'q.safetensors'}"


def test_a_dry_run_reads_no_weights_and_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    result = run(model, "--scheme", "w4g64", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["file"] is None
    by_name = {row["tensor"]: row for row in record["tensors"]}
    assert by_name[LINEAR]["scheme"] == "w4g64"
    assert by_name[HEAD]["scheme"] == "w8"
    assert "sqnr_db" not in by_name[LINEAR]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_default_name_and_force(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("small", "--random-weights").exit_code == 0
    first = (tmp_path / "small-int8.safetensors").read_bytes()
    refusal = run("small")
    assert refusal.exit_code == 2
    assert "--force" in refusal.stderr
    assert (tmp_path / "small-int8.safetensors").read_bytes() == first
    assert run("small", "--force").exit_code == 0
    assert (tmp_path / "small-int8.safetensors").read_bytes() != first


def test_a_recipe_file_decides(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "[[rules]]\npattern = 'lm_head\\.weight'\nscheme = 'w4g32'\n"
        "[[rules]]\npattern = '.*'\nscheme = 'w8'\n"
    )
    result = run(model, "--recipe", recipe, "-o", tmp_path / "q", "--json")
    assert result.exit_code == 0, result.output
    contents = load_quantized(tmp_path / "q")
    head, embedding = contents[HEAD], contents[EMBEDDING]
    assert isinstance(head, QuantizedTensor)
    assert isinstance(embedding, QuantizedTensor)
    assert (head.bits, embedding.bits) == (4, 8)


def test_per_channel_int4_warns_on_stderr(model: Path) -> None:
    result = run(model, "--scheme", "w4", "--dry-run", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert result.stderr.startswith("edgekit: warning: w4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8", "--int4"], "--int8 and --int4 exclude each other"),
        (["--float", "--scheme", "w8"], "--float and --scheme exclude each other"),
        (["--int4", "--recipe", "r.toml"], "--int4 and --recipe exclude each other"),
        (["--scheme", "w5"], "unknown scheme 'w5': allowed are"),
        (["--scheme", "w8a8"], "has static ranges of activations and is for modules"),
        (["--scheme", "w4g128"], "cannot hold it: group size 128"),
        (["--recipe", "absent.toml"], "absent.toml: cannot be read"),
        (["-o", "."], "is a folder"),
        (["-o", "small/config.json/q"], "config.json: is no folder"),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(model, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_weights_that_are_not_finite_write_nothing(model: Path, tmp_path: Path) -> None:
    shapes = ModelConfig.load(model).tensor_shapes()
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    weights[LINEAR][1, 1] = torch.nan
    save_file(weights, model / "model.safetensors")
    result = run(model, "-o", tmp_path / "q.safetensors")
    assert result.exit_code == 2
    assert LINEAR in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_folders_above_the_output_are_made(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folders" / "q.safetensors"
    result = command_line.run("quantize", "lfm2-tiny", "-o", output)
    assert result.exit_code == 0, result.output
    assert [path.name for path in output.parent.iterdir()] == ["q.safetensors"]
