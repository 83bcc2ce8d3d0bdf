"""Codebooks in files: what each target holds, what is said of it, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from support import ggml
from support.command_line import assert_codes_refused, done, run
from support.gguf_models import small_model

from benchmarks import onnx_gather
from edgekit.exporters.gguf.block_types import block_type
from edgekit.exporters.gguf.blocks import block_pieces
from edgekit.exporters.readback import read_weights
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.read import Artifact
from edgekit.models.codes import CodesFile
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.recipe import Recipe
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import load_quantized
from edgekit.quantize.tensor import QuantizedTensor

LINEAR = "model.layers.0.feed_forward.w1.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes that JLCM learned, with several codebooks for each matrix and neurons re-ordered."""
    folder = tmp_path_factory.mktemp("learned")
    text = folder / "text.txt"
    text.write_text("".join(TEXT[start:] for start in range(0, 400, 40)))
    path = folder / "cb3.safetensors"
    arguments = ("--scheme", "cb3x2", "--calibrate", text, "--method", "jlcm", "-o", path)
    made = done("quantize", model, *arguments)
    assert [step["step"] for step in made["gains"]["steps"]] == ["kmeans", "jlcm"]
    return path


@pytest.mark.parametrize(
    "target", ["gguf", "onnx", pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_learned_codes_reach_the_file_bit_for_bit(
    model: Path, learned: Path, tmp_path: Path, target: str
) -> None:
    out = tmp_path / "out"
    common = ("--target", target, "--context", "64")
    made = done("export", model, *common, "--codes", learned, "-o", out)
    assert made["verification"]["verified"]
    assert made["method"] == "jlcm"
    row = next(row for row in made["tensors"] if row["tensor"] == LINEAR)
    assert (row["scheme"], row["stored_as"], row["bytes"]) == ("cb3x2", "w8", 96 * 64 + 96 * 4)
    assert "cb3x2, stored as w8" in run("inspect", out).output
    contents = load_quantized(learned)
    for name, value in read_weights(target, Artifact.open(out).model_path, ModelConfig.load(model)):
        wanted = contents[name]
        wanted = wanted.dequantize() if isinstance(wanted, QuantizedTensor) else wanted
        assert torch.equal(value.reshape(wanted.shape), wanted), name
    again = done("verify", out, "--model", model)
    assert again["verification"] == made["verification"]


def test_the_file_of_codes_has_the_bits_that_are_stated(model: Path, learned: Path) -> None:
    rows = {row.tensor: row for row in CodesFile.open(learned, ModelConfig.load(model)).table}
    assert rows[LINEAR].scheme.name == "cb3x2"
    assert rows[LINEAR].nbytes == 96 * 24 + 96 * 4 + 2 * 8
    arrays = load_file(learned)
    parts = [arrays[f"{LINEAR}.{part}"] for part in ("codes", "scales", "codebook")]
    assert sum(part.nbytes for part in parts) == rows[LINEAR].nbytes


def test_neurons_are_reordered_and_the_float_tensors_with_them(model: Path, learned: Path) -> None:
    stored, given = load_file(learned), load_file(model / "model.safetensors")
    exact = given[LINEAR].float()
    contents = load_quantized(learned)
    wanted = contents[LINEAR]
    assert isinstance(wanted, QuantizedTensor)
    # Each stored row is nearest to one row of the checkpoint: the order, which is not the old one.
    order = torch.cdist(wanted.dequantize(), exact).argmin(1)
    assert sorted(order.tolist()) == list(range(96))
    assert order.tolist() != list(range(96))
    other = contents["model.layers.0.feed_forward.w2.weight"]
    assert isinstance(other, QuantizedTensor)
    columns = given["model.layers.0.feed_forward.w2.weight"].float()[:, order]
    assert torch.cdist(other.dequantize().t(), columns.t()).argmin(1).tolist() == list(range(96))
    kernel = "model.layers.0.conv.conv.weight"  # two codebooks do not divide into three blocks
    assert torch.equal(stored[kernel], given[kernel].float())


def test_kmeans_needs_no_text_and_verifies_anew(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--target", "onnx", "--context", "64", "--scheme", "cb4g32", "-o", out)
    made = done("export", model, *arguments)
    assert made["method"] == "kmeans"
    assert {row.get("stored_as") for row in made["tensors"]} == {None, "w8g32"}
    assert done("verify", out, "--model", model)["verification"] == made["verification"]


def test_iq4_nl_is_ggmls_own(model: Path, tmp_path: Path) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    tensor = quantize_weight(parse_scheme("cb4nl"), weight)
    assert block_type(parse_scheme("cb4nl")) == "IQ4_NL"
    data = np.concatenate(list(block_pieces("w", tensor)))
    assert data.nbytes == 6 * 64 // 32 * 18
    by_gguf_py = dequantize(data.reshape(6, -1), GGMLQuantizationType.IQ4_NL)
    by_ggml = ggml.dequantize(data.tobytes(), GGMLQuantizationType.IQ4_NL)
    assert np.array_equal(by_gguf_py, tensor.dequantize().numpy())
    assert np.array_equal(by_ggml.reshape(6, 64), tensor.dequantize().numpy())
    out = tmp_path / "out"
    made = done(
        "export", model, "--target", "gguf", "--context", 64, "--scheme", "cb4nl", "-o", out
    )
    assert made["verification"]["verified"]
    assert not any("stored_as" in row for row in made["tensors"])
    assert "IQ4_NL" in run("inspect", out).output
    assert done("verify", out, "--model", model)["verification"] == made["verification"]


def test_a_learned_table_is_not_ggmls(model: Path) -> None:
    tensor = quantize_weight(parse_scheme("cb4g32"), torch.randn(4, 32))
    with pytest.raises(ValueError, match="no blocks for the codebooks of cb4g32"):
        block_type(parse_scheme("cb4g32"))
    with pytest.raises(Exception, match="ggml has no blocks for codebooks but its own"):
        list(block_pieces("w", tensor))


def test_xnnpack_refuses_groups_and_says_why(model: Path, tmp_path: Path) -> None:
    refused = run(
        "export", model, "--target", "executorch", "--scheme", "cb3g32", "-o", tmp_path / "out"
    )
    assert refused.exit_code == 2
    assert "cannot hold w8g32" in refused.stderr
    assert "cb3g32 is stored as w8g32, its entries as int8 codes" in refused.stderr


@pytest.mark.parametrize("scheme", ["cb4", "cb3", "cb2", "cb3x2", "cb3g32", "cb4nl"])
def test_onnx_holds_codebooks_exactly_by_gather(scheme: str) -> None:
    """The reference form: no target writes it, for ONNX Runtime folds it to floats."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    tensor = quantize_weight(parse_scheme(scheme), weight)
    wanted = tensor.dequantize().numpy()
    whole = onnx_gather.gather_model(tensor)
    model = onnx_gather.looked_up(whole)
    onnx.checker.check_model(model)
    assert np.array_equal(ReferenceEvaluator(model).run(None, {})[0], wanted)
    for config in ({}, onnx_gather.NOTHING_FOLDED):
        session = onnx_gather.session(model.SerializeToString(), config)
        assert np.array_equal(session.run(None, {})[0], wanted)
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    (y,) = onnx_gather.session(whole.SerializeToString(), {}).run(None, {"x": x})
    assert np.allclose(y, x @ wanted.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "w4", "--method", "kmeans"), "is for codebooks, of which w4 has none"),
        (("--scheme", "cb3", "--method", "rtn"), "is not for codebooks, which cb3 has"),
        (("--scheme", "cb3", "--method", "jlcm"), "--method jlcm needs a text"),
        (("--scheme", "cb5"), "unknown scheme 'cb5'"),
        (("--scheme", "cb3x1"), "x1 is said by leaving it out"),
        (("--scheme", "cb3x7"), "7 codebooks do not divide"),
        (("--scheme", "cb3g30"), "must be a multiple of 32"),
    ],
)
def test_what_is_refused(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    refused = run("quantize", model, *arguments, "-o", tmp_path / "q")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_gives_codebooks_no_range(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[[rules]]\npattern = ".*"\nscheme = "cb3"\nrange = "mse"\n')
    with pytest.raises(Exception, match="range has no meaning for the codebooks of cb3"):
        Recipe.load(path)


def _half(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = arrays[f"{LINEAR}.codebook"][:, :4].contiguous()


def _floats(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = arrays[f"{LINEAR}.codebook"].float() + 0.5


def _nan(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = arrays[f"{LINEAR}.codebook"].float() * torch.nan


def _many(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = torch.ones(5, 8, dtype=torch.int8)


def _huge(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = torch.ones(1 << 18, 8, dtype=torch.int8)


def _deep(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codebook"] = arrays[f"{LINEAR}.codebook"][None]


def _none(arrays: dict[str, torch.Tensor]) -> None:
    del arrays[f"{LINEAR}.codebook"]


def _short(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.codes"] = arrays[f"{LINEAR}.codes"][:, :-1].contiguous()


def _scales(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.scales"] = arrays[f"{LINEAR}.scales"] * 1.0001


def _points(arrays: dict[str, torch.Tensor]) -> None:
    arrays[f"{LINEAR}.zero_points"] = torch.zeros(96, dtype=torch.uint8)


@pytest.mark.parametrize(
    "change", [_half, _floats, _nan, _many, _huge, _deep, _none, _short, _scales, _points]
)
def test_hostile_codebooks(
    model: Path,
    learned: Path,
    tmp_path: Path,
    change: Any,  # noqa: ANN401
) -> None:
    from safetensors import safe_open

    with safe_open(learned, framework="pt") as file:
        metadata = file.metadata()
    arrays = load_file(learned)
    change(arrays)
    save_file(arrays, tmp_path / "q", metadata=metadata)
    assert_codes_refused(model, tmp_path / "q")
