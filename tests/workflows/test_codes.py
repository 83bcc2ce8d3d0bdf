"""Codes from a file as the input of an export: packed as they are, or refused in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import done, run
from support.gguf_models import small_model

from edgekit.errors import EdgekitError
from edgekit.exporters.read_codes import codes_of
from edgekit.exporters.readback import read_weights
from edgekit.formats.artifact.read import Artifact
from edgekit.models.checkpoint import Checkpoint
from edgekit.models.codes import CodesFile
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import About, Contents, load_quantized, save_quantized
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.workflows.api import export_model

LINEAR = "model.layers.0.feed_forward.w2.weight"
NORM = "model.embedding_norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "small-int4.safetensors"
    done("quantize", model, "--int4", "-o", path)
    return path


def about_of(model: Path, method: str = "gptq") -> About:
    return About("small", Checkpoint.open(model).sha256(), "mine", method, {"texts": 3})


def other_codes(contents: Contents, seed: int = 0) -> Contents:
    """Codes that no rounding would have chosen."""
    generator = torch.Generator().manual_seed(seed)

    def turned(tensor: QuantizedTensor) -> QuantizedTensor:
        low = -127 if tensor.bits == 8 else tensor.code_range[0]
        codes = torch.randint(low, tensor.code_range[1] + 1, tensor.shape, generator=generator)
        codes = codes.to(tensor.codes.dtype)
        return replace(tensor, codes=codes, scales=tensor.scales.clone())

    changed = {
        name: turned(value) if isinstance(value, QuantizedTensor) else value
        for name, value in contents.items()
    }
    if contents[HEAD] is contents[EMBEDDING]:
        changed[HEAD] = changed[EMBEDDING]
    return changed


def floats(value: object) -> torch.Tensor:
    assert isinstance(value, QuantizedTensor | torch.Tensor)
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_the_codes_of_a_recipe_give_the_files_of_the_recipe(
    model: Path, quantized: Path, tmp_path: Path, target: str
) -> None:
    common = ("--target", target, "--context", "64")
    by_recipe = done("export", model, "--int4", *common, "-o", tmp_path / "recipe")
    by_codes = done("export", model, "--codes", quantized, *common, "-o", tmp_path / "codes")
    one, other = (Artifact.open(tmp_path / name).manifest for name in ("recipe", "codes"))
    assert one.files == other.files
    assert by_codes["recipe"] == "int4"
    assert by_codes["method"] == by_recipe["method"] == "mse"
    assert "codes_sha256" not in by_recipe
    assert by_codes["verification"]["verified"]


@pytest.mark.parametrize(
    "target", ["gguf", "onnx", pytest.param("executorch", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("tied", [True, False], ids=["one-table", "head-of-its-own"])
def test_other_codes_reach_the_file_bit_for_bit(
    model: Path, quantized: Path, tmp_path: Path, target: str, tied: bool
) -> None:
    contents = other_codes(load_quantized(quantized))
    if not tied:
        contents[HEAD] = other_codes(contents, seed=1)[EMBEDDING]
    path = tmp_path / "mine.safetensors"
    # Random codes, far from the weights: that they are near is not what is asked of codes.
    save_quantized(path, contents, about_of(model))
    artifact = export_model(str(model), tmp_path / "out", target=target, codes=path, context=64)
    found = dict(read_weights(target, artifact.model_path, ModelConfig.load(model)))
    for name, value in found.items():
        assert torch.equal(value.reshape(floats(contents[name]).shape), floats(contents[name])), (
            name
        )
    assert (HEAD in found) is not tied
    assert set(found) | {HEAD} == set(contents)
    made = artifact.decoder
    assert (made.method, made.recipe, made.facts) == ("gptq", "mine", {"texts": 3})
    again = done("verify", tmp_path / "out", "--model", model)
    assert again["verification"] == made.verification
    assert "small, recipe mine, codes by gptq, context" in run("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize("scheme", ["w8", "w4", "w8g64", "w4g32", "w4g32a", "w5g32", "w8g16"])
def test_codes_are_found_in_what_they_dequantize_to(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 128, generator=generator)
    weight[3] = 0
    weight[5] = 0.25
    wanted = parse_scheme(scheme)
    values = quantize_weight(wanted, weight).dequantize()
    found = codes_of(values, wanted)
    assert torch.equal(found.dequantize(), values)
    assert (found.bits, found.group_size, found.signed) == (
        wanted.bits,
        wanted.group_size,
        wanted.symmetric,
    )
    with pytest.raises(ValueError, match=rf"none of {scheme}"):
        codes_of(weight, wanted)


def test_a_tied_head_may_be_left_out(model: Path, quantized: Path, tmp_path: Path) -> None:
    contents = load_quantized(quantized)
    del contents[HEAD]
    save_quantized(tmp_path / "q", contents, about_of(model))
    codes = CodesFile.open(tmp_path / "q", ModelConfig.load(model))
    assert codes.table.tied == {HEAD: EMBEDDING}
    assert torch.equal(floats(codes[HEAD]), floats(contents[EMBEDDING]))


def test_one_tensor_is_read_at_a_time(model: Path, quantized: Path, tmp_path: Path) -> None:
    """A tensor that is damaged does not matter to the others."""
    contents = load_quantized(quantized)
    damaged = contents[LINEAR]
    assert isinstance(damaged, QuantizedTensor)
    contents[LINEAR] = replace(damaged, scales=damaged.scales + 1e-7)
    save_quantized(tmp_path / "q", contents, about_of(model))
    codes = CodesFile.open(tmp_path / "q", ModelConfig.load(model))
    assert torch.equal(floats(codes[EMBEDDING]), floats(contents[EMBEDDING]))
    with pytest.raises(EdgekitError, match=rf"{LINEAR}: a scale is none that every target holds"):
        codes[LINEAR]


@pytest.mark.parametrize("method", ["mse", "qat"])
def test_codes_of_other_weights_are_refused(
    model: Path, quantized: Path, tmp_path: Path, method: str
) -> None:
    foreign = replace(about_of(model), sha256="0" * 64, method=method)
    contents = load_quantized(quantized)
    save_quantized(tmp_path / "q", contents, foreign)
    arguments = ("export", model, "--codes", tmp_path / "q", "--target", "gguf", "--context", "64")
    refused = run(*arguments, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"edgekit: {tmp_path / 'q'}: was made of other weights than those of small: of a model "
        "called small\n"
    )
    assert not (tmp_path / "out").exists()


Change = Callable[[Contents], None]


def _remove(contents: Contents) -> None:
    del contents[NORM]


def _add(contents: Contents) -> None:
    contents["more"] = torch.ones(3)


def _turn(contents: Contents) -> None:
    contents[LINEAR] = quantize_weight(parse_scheme("w4g32"), torch.randn(96, 64))


def _codebook(contents: Contents) -> None:
    shape = contents[LINEAR].shape
    contents[LINEAR] = QuantizedTensor(
        torch.ones(*shape, dtype=torch.uint8),
        torch.ones(shape[0]),
        bits=4,
        axis=0,
        codebook=torch.randn(16),
    )


def _three_bits(contents: Contents) -> None:
    shape = contents[LINEAR].shape
    contents[LINEAR] = QuantizedTensor(
        torch.ones(*shape, dtype=torch.int8), torch.ones(shape[0]), bits=3, axis=0
    )


def _lowest_code(contents: Contents) -> None:
    shape = contents[LINEAR].shape
    contents[LINEAR] = QuantizedTensor(
        torch.full(shape, -128, dtype=torch.int8), torch.ones(shape[0]), axis=0
    )


def _integers(contents: Contents) -> None:
    contents[NORM] = torch.ones(contents[NORM].shape, dtype=torch.int8)


def _nan(contents: Contents) -> None:
    contents[NORM] = torch.full(contents[NORM].shape, torch.nan)


def _zero_points(contents: Contents) -> None:
    contents[LINEAR] = quantize_weight(parse_scheme("w4g32a"), torch.randn(contents[LINEAR].shape))


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        (_remove, "gguf", f"holds no codes of this model: 1 missing: {NORM}"),
        (_add, "gguf", "holds no codes of this model: 1 unexpected: more"),
        (_turn, "gguf", f"1 of the wrong shape: {LINEAR} (is [96, 64], should be [64, 96])"),
        (
            _codebook,
            "gguf",
            f"{LINEAR}: a codebook that is not [levels] or [books, levels] of int8",
        ),
        (_three_bits, "gguf", f"{LINEAR}: codes of 3 bits: no target holds them"),
        (_lowest_code, "gguf", f"{LINEAR}: w8 has codes from -127 to 127, got -128 to -128"),
        (_integers, "gguf", f"{NORM}: is stored as integers, but not as codes"),
        (_nan, "gguf", f"{NORM} holds NaN or infinite values"),
        (_zero_points, "executorch", f"{LINEAR}: target executorch cannot hold w4g32a"),
    ],
)
def test_what_a_file_of_codes_may_not_hold(
    model: Path, quantized: Path, tmp_path: Path, change: Change, target: str, message: str
) -> None:
    contents = load_quantized(quantized)
    change(contents)
    save_quantized(tmp_path / "q", contents, about_of(model))
    _refused(model, tmp_path, message, "--target", target)


def _refused(model: Path, folder: Path, message: str, *arguments: object) -> None:
    before = {path.name for path in folder.iterdir()}
    result = run(
        "export",
        model,
        "--codes",
        folder / "q",
        *arguments,
        "--context",
        "64",
        "-o",
        folder / "out",
    )
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert {path.name for path in folder.iterdir()} == before


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["edgekit"])
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"about": None}, "does not say which model it was made of"),
        ({"about": [1]}, "what it is about"),
        ({"about": {"more": "m"}}, "what it is about"),
        ({"about": {"method": "guess"}}, "method must be one of rtn, mse, gptq, kmeans"),
        ({"about": {"sha256": "\x1b[31m"}}, "sha256 must be 64 hexadecimal digits"),
        ({"about": {"facts": {"x": [1]}}}, "fact 'x' must be a short text or a finite number"),
        ({"format_version": 2}, "format version 2, this edgekit reads 1"),
        ({"tensors": {LINEAR: {"bits": 4}}}, "its metadata has other keys"),
        ({"tensors": {HEAD: {"same_as": "absent"}}}, "which is not there"),
        ({"tensors": {HEAD: {"same_as": HEAD}}}, "which is not there"),
    ],
)
def test_hostile_metadata(
    model: Path, quantized: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    document = _metadata(quantized)
    for key, value in changes.items():
        kept = document[key]
        document[key] = (
            kept | value if isinstance(value, dict) and isinstance(kept, dict) else value
        )
    save_file(load_file(quantized), tmp_path / "q", metadata={"edgekit": json.dumps(document)})
    _refused(model, tmp_path, message, "--target", "gguf")


@pytest.mark.parametrize("share", [0, 0.2, 0.99])
def test_a_truncated_file(model: Path, quantized: Path, tmp_path: Path, share: float) -> None:
    data = quantized.read_bytes()
    (tmp_path / "q").write_bytes(data[: int(len(data) * share)])
    _refused(model, tmp_path, "truncated", "--target", "gguf")


def test_other_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes((model / "model.safetensors").read_bytes())
    _refused(model, tmp_path, "holds no quantized tensors", "--target", "gguf")
    (tmp_path / "q").unlink()
    _refused(model, tmp_path, "no such file", "--target", "gguf")


def test_what_codes_exclude(model: Path, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes(quantized.read_bytes())
    for given, name in ((("--int8",), "--int8"), (("--scheme", "w8"), "--scheme")):
        _refused(
            model, tmp_path, f"--codes and {name} exclude each other", "--target", "gguf", *given
        )
    with pytest.raises(EdgekitError, match="`codes` and recipe exclude each other"):
        export_model(str(model), tmp_path / "out", codes=tmp_path / "q", recipe="int8")
