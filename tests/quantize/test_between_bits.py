"""Codes of 5 and 6 bits: into every target or refused, in files of codes, in training."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import assert_codes_refused, assert_only_one_line, done, run
from support.gguf_models import small_model
from torch import nn

import edgekit
from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options, find_layout
from edgekit.exporters.readback import read_weights
from edgekit.formats.artifact.read import Artifact
from edgekit.formats.gguf.file import GgufFile
from edgekit.models.config import ModelConfig
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.names import EMBEDDING
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import load_quantized
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.workflows.target_schemes import target_schemes

LINEAR = "model.layers.0.feed_forward.w2.weight"
CONTEXT = ("--context", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "wide"
    return small_model(folder, hidden_size=256, intermediate_size=256)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bits for the tied table and half of the linears, five for the others."""
    path = tmp_path_factory.mktemp("recipe") / "between.json"
    rules = [
        {"pattern": r".*(w1|w2|proj|embed_tokens|lm_head)\.weight", "scheme": "w6g16"},
        {"pattern": ".*", "scheme": "w5g32"},
    ]
    path.write_text(json.dumps({"rules": rules}))
    return path


@pytest.fixture(scope="module")
def codes(model: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codes") / "between.safetensors"
    done("quantize", model, "--recipe", recipe, "-o", path)
    return path


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_codes_reach_the_file_bit_for_bit(
    model: Path, recipe: Path, codes: Path, tmp_path: Path, target: str
) -> None:
    common = ("--target", target, *CONTEXT)
    made = done("export", model, *common, "--codes", codes, "-o", tmp_path / "codes")
    done("export", model, *common, "--recipe", recipe, "-o", tmp_path / "recipe")
    artifact = Artifact.open(tmp_path / "codes")
    assert artifact.manifest.files == Artifact.open(tmp_path / "recipe").manifest.files
    contents = load_quantized(codes)
    for name, value in read_weights(target, artifact.model_path, ModelConfig.load(model)):
        wanted = contents[name]
        wanted = wanted.dequantize() if isinstance(wanted, QuantizedTensor) else wanted
        assert torch.equal(value.reshape(wanted.shape), wanted), name
    for folder in ("codes", "recipe"):
        again = done("verify", tmp_path / folder, "--model", model)
        assert again["verification"]["kld_engine_vs_quantized"] == pytest.approx(
            made["verification"]["kld_engine_vs_quantized"], rel=1e-6
        )
    stored = {row.get("stored_as") for row in made["tensors"]}
    assert stored == ({None} if target == "gguf" else {None, "w8g16", "w8g32"})


def test_a_gguf_holds_them_in_the_bytes_that_are_stated(
    model: Path, codes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = done("export", model, "--target", "gguf", *CONTEXT, "--codes", codes, "-o", out)
    rows = {row["tensor"]: row for row in made["tensors"]}
    tensors = GgufFile.open(out / "model.gguf").tensors
    table, linear = tensors["token_embd.weight"], tensors["blk.0.ffn_down.weight"]
    assert (table.type, tensors["blk.0.ffn_up.weight"].type) == ("Q6_K", "Q5_0")
    assert rows[EMBEDDING]["bytes"] == table.nbytes == 4100 * 210
    arrays = load_file(codes)
    parts = [arrays[f"{LINEAR}.{part}"].nbytes for part in ("codes", "scales", "steps")]
    assert sum(parts) == rows[LINEAR]["bytes"] == linear.nbytes


@pytest.mark.parametrize(
    ("target", "scheme", "message"),
    [
        ("executorch", "w6g16", "cannot hold w8g16; for linear layers XNNPACK holds float, w8, w4"),
        ("executorch", "w5g32", ": w5g32 is stored as w8g32, its codes as int8, but target"),
        ("executorch", "w5g32", "; target gguf holds w5g32 as such"),
        ("gguf", "w8g16", "target gguf cannot hold w8g16: its 8-bit blocks are of 32 weights"),
    ],
)
def test_what_a_target_cannot_hold(
    model: Path, tmp_path: Path, target: str, scheme: str, message: str
) -> None:
    out = tmp_path / "out"
    refused = run("export", model, "--target", target, "--scheme", scheme, "-o", out)
    assert_only_one_line(refused, message)
    assert not out.exists()


def test_rows_of_parts_of_blocks_are_refused_before_any_work(tmp_path: Path) -> None:
    narrow = small_model(tmp_path / "narrow")
    (narrow / "model.safetensors").write_bytes(b"")  # nothing reads it
    out = tmp_path / "out"
    refused = run("export", narrow, "--target", "gguf", "--scheme", "w6g16", "-o", out)
    assert_only_one_line(
        refused, "w6g16 cannot hold it: its blocks are of 256 columns, which do not divide 64"
    )


@pytest.mark.parametrize(
    ("target", "found"),
    [("gguf", {"w5g32", "w6g16"}), ("onnx", set()), ("executorch", set())],
)
def test_a_budget_chooses_among_those_that_a_target_holds_as_such(
    target: str, found: set[str]
) -> None:
    shapes, _ = ModelConfig.load(edgekit_model()).tied_shapes()
    schemes = {scheme.name for scheme in target_schemes(find_layout(target, Options()), shapes)}
    assert schemes & {"w5g32", "w6g16", "w8g16"} == found
    assert {"w4g32", "w8"} <= schemes


def edgekit_model() -> Path:
    from edgekit.models.source import resolve_model

    folder = resolve_model("lfm2-tiny").folder
    assert folder is not None
    return folder


@pytest.mark.parametrize("damage", ["steps", "type", "shape", "least", "largest", "extra"])
def test_hostile_files_of_codes(model: Path, codes: Path, tmp_path: Path, damage: str) -> None:
    with safe_open(codes, framework="pt") as file:
        metadata = file.metadata()
    arrays = load_file(codes)
    steps, scales = f"{LINEAR}.steps", f"{LINEAR}.scales"
    if damage == "steps":
        del arrays[steps]
    elif damage == "type":
        arrays[steps] = arrays[steps].float()
    elif damage == "shape":
        arrays[steps] = arrays[steps][:-1].contiguous()
    elif damage == "least":
        arrays[scales][0, 0] = 0
    elif damage == "largest":
        arrays[scales][0] = 126
    else:
        arrays["model.layers.0.feed_forward.w3.weight.steps"] = arrays[steps].clone()
    save_file(arrays, tmp_path / "q", metadata=metadata)
    assert_codes_refused(model, tmp_path / "q")


@pytest.mark.parametrize(("recipe", "bits"), [("w6g16", 6), ("w5g32", 5)])
def test_training_ends_in_codes_of_the_scheme(recipe: str, bits: int) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(256, 8, bias=False)), torch.randn(3, 256)
    qat = edgekit.prepare(net, recipe)
    net(x).square().sum().backward()
    qat.step()
    assert net.get_parameter("0.weight").grad is not None
    exact = net.get_parameter("0.weight").detach().clone()
    rounded = net.eval()(x)
    weight = qat.finalize()["0.weight"]
    assert isinstance(weight, QuantizedTensor)
    assert weight.bits == bits
    assert torch.equal(weight.codes, quantize_weight(parse_scheme(recipe), exact).codes)
    assert torch.allclose(rounded, x @ weight.dequantize().t(), rtol=1e-5, atol=1e-6)


def test_a_step_in_common_is_not_learned() -> None:
    net = nn.Sequential(nn.Linear(256, 8))
    with pytest.raises(EdgekitError, match=r"0\.weight: the scales of w6g16 .* leave learn_scales"):
        edgekit.prepare(net, "w6g16", learn_scales=True)
    edgekit.prepare(nn.Sequential(nn.Linear(256, 8)), "w5g32", learn_scales=True)
