"""Modules on the command line: export, quantize, inspect, verify, bench, and what goes wrong."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from support.command_line import assert_one_line, assert_only_one_line, edgekit, killed_at, run

from edgekit import export as edgekit_export
from edgekit.cli import main
from edgekit.common.files import sha256_of
from edgekit.formats.artifact.read import Artifact
from edgekit.networks.user_code import Factory
from edgekit.quantize.storage import load_quantized, load_with_about, save_quantized
from edgekit.quantize.tensor import QuantizedTensor

CODE = """
import os
import signal
import sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))

class Branching(Net):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens, x):
        return self.head(self.table(tokens) + x)

def net():
    torch.manual_seed(0)
    return Net()

def talkative():
    print("building")
    return net()

def branching():
    return Branching()

def two():
    torch.manual_seed(0)
    return Two()

def broken():
    return [][3]

def leaving():
    sys.exit("enough")

def odd():
    raise BaseException("odd")

def terminated():
    os.kill(os.getpid(), signal.SIGTERM)

def nothing():
    return None

number = 3

def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        yield torch.randn(2, 3, 6, 6, generator=generator)

def no_batches():
    return []

def one_tensor():
    return torch.zeros(4, 3, 6, 6)

def broken_batches():
    yield torch.randn(2, 3, 6, 6)
    raise RuntimeError("no more images")

def words():
    yield "a word"

def sparse():
    yield torch.randn(2, 3, 6, 6).to_sparse()

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def mute():
    raise Mute

def mute_batches():
    yield torch.randn(2, 3, 6, 6)
    raise Mute

def another():
    torch.manual_seed(1)
    return Net()

def table():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
"""
STAGES = ("tracing", "calibrating", "quantizing", "writing the graph", "verifying in onnxruntime")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code" / "net.py"
    path.parent.mkdir()
    path.write_text(CODE)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder to write into."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def images(path: Path, values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Path:
    np.save(path, values)
    return path


def some(count: int = 5) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.random.default_rng(0).standard_normal((count, 3, 6, 6), dtype=np.float32)


def export(code: Path, output: Path, *more: object, name: str = "net") -> Result:
    words = ["export", f"{code}:{name}", "--target", "onnx", "--example-shape", "1x3x6x6"]
    return CliRunner().invoke(main, [*words, "-o", str(output), *map(str, more)])


def test_export_inspect_verify_and_bench(code: Path, place: Path) -> None:
    data = images(place / "x.npy", some())
    words = ("--max-batch", 4, "--calibrate", data, "--json")
    done = export(code, place / "net", *words, name="talkative")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == "building\n"  # what the function prints, and no warning
    said = json.loads(done.stdout)
    assert said["recipe"] == "w8a8"
    assert said["max_batch"] == 4
    shown = run("inspect", place / "net")
    assert "layers as run: 2 on integers, none in float" in shown.stdout
    assert re.fullmatch(r".*/model.onnx: [\d,]+ bytes", shown.stdout.splitlines()[0])
    again = run("verify", place / "net")
    assert again.exit_code == 0, again.stderr
    assert again.stdout.startswith("verified over 8 outputs, batches of 4\n")
    assert Artifact.open(place / "net").manifest.verification["batches"] == [1, 4]
    timed = run("bench", place / "net", "-r", 2, "--batch", 3, "--json")
    assert timed.exit_code == 0, timed.stderr
    (result,) = json.loads(timed.stdout)["artifacts"]
    assert result["batch"] == 3
    assert len(result["samples"]) == 2
    assert result["summary"]["ms"]["min"] <= result["summary"]["ms"]["median"]


def test_ranges_that_do_not_fit_are_a_warning(code: Path, place: Path) -> None:
    data = images(place / "x.npy", some() / 100)
    assert export(code, place / "narrow", "--calibrate", data).exit_code == 0
    ranges = place / "narrow" / "calibration.json"
    done = export(code, place / "net", "--calibrate", ranges, "--json")  # verified on normal floats
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["verification"]
    assert found["quantization_rms_steps"] > 8
    assert found["max_rms_steps"] == max(0.5, 2 * found["otherwise_rms_steps"])
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgekit: warning: quantization moves the outputs by ")


def test_two_artifacts_are_timed_in_turn(code: Path, place: Path) -> None:
    for name in ("float", "int8"):
        done = export(
            code, place / name, f"--{name}", "--calibrate", f"{code}:batches", "--max-batch", 2
        )
        assert done.exit_code == 0, done.stderr
    record = place / "record.json"
    done = run("bench", place / "float", place / "int8", "-r", 3, "-o", record)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"\| int8 +\| +\d+\.\d\dx \|", done.stdout)
    document = json.loads(record.read_text())
    orders = [[sample["order"] for sample in item["samples"]] for item in document["artifacts"]]
    assert orders == [[0, 2, 4], [1, 3, 5]]
    assert [item["recipe"] for item in document["artifacts"]] == ["float", "w8a8"]
    assert_only_one_line(run("bench", place / "int8", "-p", 4), "-p is for language models")
    assert_only_one_line(run("bench", place / "int8", "--batch", 3), "batches of up to 2")
    none = place / "none"
    assert_only_one_line(run("bench", place / "int8", none), f"{none}: no such file or folder")
    assert_only_one_line(run("bench", place / "int8", record), f"{record} is no artifact of a mod")


def test_a_damaged_module_fails_its_verification(code: Path, place: Path) -> None:
    done = export(code, place / "net", "--calibrate", f"{code}:batches", "--max-batch", 2)
    assert done.exit_code == 0, done.stderr
    path = place / "net" / "edgekit.json"
    reference = place / "net" / "reference.safetensors"
    held = load_file(reference)
    save_file(held | {"simulated.0": held["simulated.0"] * 2}, reference)
    assert_only_one_line(run("verify", place / "net"), "reference.safetensors", status=1)
    document = json.loads(path.read_text())
    document["files"]["reference.safetensors"]["sha256"] = sha256_of(reference)
    document["files"]["reference.safetensors"]["bytes"] = reference.stat().st_size
    path.write_text(json.dumps(document))
    assert_only_one_line(run("verify", place / "net"), "the bound is", status=1)


@pytest.mark.parametrize("command", ["run", "eval", "fit", "compare"])
def test_commands_for_language_models_say_what_to_use(
    code: Path, place: Path, command: str
) -> None:
    assert export(code, place / "net", "--float").exit_code == 0
    more: dict[str, list[object]] = {"run": ["hello"], "eval": ["--text", code]}
    done = run(command, place / "net", *more.get(command, []))
    assert_only_one_line(done, "is a module, not a language model", "edgekit bench")


def test_quantize_writes_codes_and_a_calibration_that_export_takes(code: Path, place: Path) -> None:
    shape = ("--example-shape", "1x3x6x6", "--max-batch", 4)
    words = ("quantize", f"{code}:net", *shape, "-o", place / "net.safetensors")
    done = run(*words, "--calibrate", f"{code}:batches", "--method", "percentile")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in place.iterdir()} == {
        "net.safetensors",
        "net.calibration.json",
    }
    held = load_quantized(place / "net.safetensors")
    assert set(held) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert getattr(held["conv.weight"], "bits", None) == 8
    shown = run("inspect", place / "net.calibration.json")
    assert "calibration by percentile over 6 inputs in 3 mini-batches" in shown.stdout
    assert re.search(r"\| head +\| +-?\d", shown.stdout)
    saved = place / "net.calibration.json"
    done = export(code, place / "a", "--max-batch", 4, "--calibrate", saved)
    assert done.exit_code == 0, done.stderr
    direct = (f"{code}:batches", "--method", "percentile")
    assert export(code, place / "b", "--max-batch", 4, "--calibrate", *direct).exit_code == 0
    assert (place / "a" / "model.onnx").read_bytes() == (place / "b" / "model.onnx").read_bytes()
    assert_only_one_line(
        export(code, place / "c", "--calibrate", saved, "--method", "mse"), "--method"
    )
    assert_only_one_line(
        run(*words, "--calibrate", f"{code}:batches"), "net.safetensors: exists; give --force"
    )


def _quantized(code: Path, place: Path, *more: object) -> Path:
    words = ("quantize", f"{code}:net", "--example-shape", "1x3x6x6", "--max-batch", 4)
    data = ("--calibrate", f"{code}:batches")
    done = run(*words, *data, "-o", place / "net.safetensors", *more)
    assert done.exit_code == 0, done.stderr
    return place / "net.safetensors"


def test_export_packs_the_codes_that_quantize_wrote(code: Path, place: Path) -> None:
    codes = _quantized(code, place, "--scheme", "w4a8")
    held = load_quantized(codes)
    weight = held["conv.weight"]
    assert isinstance(weight, QuantizedTensor)
    flipped = weight.codes.flip(0).contiguous()  # codes that no rounding of the module's gives
    about = load_with_about(codes)[1]
    save_quantized(codes, {**held, "conv.weight": replace(weight, codes=flipped)}, about)
    data = ("--max-batch", 4, "--calibrate", place / "net.calibration.json")
    done = export(code, place / "out", *data, "--codes", codes, "-v")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"conv\.weight +w4a8, stored as w8a8 +4x3x3x3 +124\n", done.stdout)
    artifact = Artifact.open(place / "out")
    assert artifact.manifest.recipe == "w4a8"
    stored = [
        numpy_helper.to_array(item)
        for item in onnx.load(artifact.model_path).graph.initializer
        if item.data_type == onnx.TensorProto.INT8
    ]
    assert any(np.array_equal(each, flipped.numpy()) for each in stored)
    size, whole = (
        (place / "out" / "model.onnx").stat().st_size,
        sum(file.stat().st_size for file in (place / "out").iterdir()),
    )
    assert done.stdout.endswith(f"out: model {size:,} bytes, folder {whole:,} bytes\n")
    made = edgekit_export(
        Factory(code, "net").call(),
        (torch.zeros(1, 3, 6, 6),),
        place / "python",
        target="onnx",
        codes=codes,
        calibration=place / "net.calibration.json",
        max_batch=4,
    )
    assert made.model_path.read_bytes() == artifact.model_path.read_bytes()


def test_codes_that_are_not_the_modules(code: Path, place: Path) -> None:
    codes = _quantized(code, place)
    held, about = load_with_about(codes)
    data = ("--max-batch", 4, "--calibrate", place / "net.calibration.json", "--codes", codes)

    def refused(said: str, *more: object, name: str = "net") -> None:
        assert_only_one_line(export(code, place / "out", *data, *more, name=name), said)

    refused("--codes and --scheme exclude each other", "--scheme", "w4a8")
    refused("net.safetensors: was made of other weights than the module's", name="another")
    done = export(code, place / "out", "--max-batch", 4, "--codes", codes)
    assert_only_one_line(done, "quantized activations need --calibrate")
    weight = held["head.weight"]
    assert isinstance(weight, QuantizedTensor)
    for contents, said in (
        ({name: each for name, each in held.items() if name != "head.bias"}, "1 missing: head.b"),
        (held | {"head.bias": torch.ones(2)}, "head.bias: is float, and not what the module has"),
        (
            held | {"head.weight": replace(weight, codes=weight.codes * 0 - 128)},
            "w8a8 has codes from -127 to 127, got -128 to -128",
        ),
        (
            held | {"head.weight": replace(weight, scales=torch.ones(4), axis=1)},
            "has a scale for each entry of axis 1, its channels are those of axis 0",
        ),
        (
            held
            | {"head.weight": replace(weight, scales=torch.ones(2, 2), axis=None, group_size=2)},
            "head.weight: no layer of a module has such codes",
        ),
    ):
        save_quantized(codes, contents, about)
        refused(said)
    save_quantized(codes, held)
    refused("does not say which weights it was made of")
    codes.unlink()
    refused("no such file; `edgekit quantize` makes one")
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        None,
        [3],
        [{"tensor": "x", "scale": 0.5}],
        [{"tensor": 3, "scale": 0.5, "zero_point": 1}],
        [{"tensor": "x", "scale": -0.5, "zero_point": 1}],
        [{"tensor": "x", "scale": "0.5", "zero_point": 1}],
        [{"tensor": "x", "scale": 0.5, "zero_point": 256}],
        [{"tensor": "x", "scale": 0.5, "zero_point": True}],
    ],
)
def test_damaged_activations_of_a_manifest(code: Path, place: Path, damage: object) -> None:
    assert export(code, place / "net", "--float").exit_code == 0
    path = place / "net" / "edgekit.json"
    document = json.loads(path.read_text())
    assert document["activations"] == []
    path.write_text(json.dumps(document | {"activations": damage}))
    assert_only_one_line(run("inspect", place / "net"), "edgekit.json: activations must ")


def test_larger_mini_batches_need_no_option(code: Path, place: Path) -> None:
    done = export(code, place / "net", "--calibrate", f"{code}:batches")
    assert done.exit_code == 0, done.stderr
    manifest = Artifact.open(place / "net").network
    assert (manifest.max_batch, manifest.verification["batches"]) == (None, [1])
    found = json.loads((place / "net" / "calibration.json").read_text())
    assert (found["samples"], found["batches"]) == (6, 3)


def test_a_smaller_batch_names_the_option(code: Path, place: Path) -> None:
    words = ("export", f"{code}:net", "--target", "onnx", "--example-shape", "4x3x6x6")
    done = run(*words, "-o", place / "net", "--calibrate", f"{code}:batches")
    assert_only_one_line(
        done, "of shape [4, 3, 6, 6], got torch.float32 of shape [2, 3, 6, 6]; --max-batch"
    )
    images(place / "few.npy", some(3))
    done = run(*words, "-o", place / "net", "--calibrate", place / "few.npy")
    assert_only_one_line(done, "holds 3 inputs, the module takes batches of 4: give --max-batch")


def test_inputs_by_name_and_results_by_theirs(code: Path, place: Path) -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 9, (7, 5))
    x = generator.standard_normal((7, 5, 4), dtype=np.float32)
    np.savez(place / "data.npz", tokens=tokens, x=x)
    words = ("export", f"{code}:two", "--target", "onnx", "-o", place / "two", "--max-batch", 3)
    shapes = ("--example-shape", "x=1x5x4", "--example-shape", "tokens=1x5:int64")
    done = run(*words, *shapes, "--calibrate", place / "data.npz")
    assert done.exit_code == 0, done.stderr
    manifest = Artifact.open(place / "two").network
    assert [item.name for item in manifest.inputs] == ["tokens", "x"]
    assert [item.name for item in manifest.outputs] == ["output_0"]
    shown = run("inspect", place / "two").stdout
    assert "takes tokens int64, x float32; gives output_0 float32" in shown
    for more, said in (
        (("--example-shape", "x=1x5x4", "--example-shape", "1x5"), "or none one"),
        (("--example-shape", "x=1x5x4", "--example-shape", "x=1x5"), "or none one"),
        (("--example-shape", "y=1x5x4"), "Two takes no input 'y': it takes tokens, x"),
        (("--example-shape", "1x5:float64"), "allowed are float32, int64, int32, uint8, bool"),
        (("--example-shape", "1x5:bool", "--example-dtype", "int64"), "--example-dtype says"),
    ):
        assert_only_one_line(run(*words, "--force", "--float", *more), said)


def test_a_function_gives_mini_batches_by_name(code: Path, place: Path) -> None:
    code.write_text(
        CODE
        + """
def named():
    for seed in range(2):
        x = torch.rand(4, 5, 4, generator=torch.Generator().manual_seed(seed))
        yield {"x": x.numpy(), "tokens": torch.zeros(4, 5).long()}

def unnamed():
    yield {"x": torch.rand(4, 5, 4)}
"""
    )
    shapes = ("--example-shape", "1x5:int64", "--example-shape", "1x5x4")
    words = ("export", f"{code}:two", "--target", "onnx", "-o", place / "two", *shapes)
    done = run(*words, "--calibrate", f"{code}:named")
    assert done.exit_code == 0, done.stderr
    done = run(*words, "--force", "--calibrate", f"{code}:unnamed")
    assert_only_one_line(done, "batch 1 must have a tensor for each input, tokens, x: it has x")


def test_several_inputs_of_both_types(code: Path, place: Path) -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 9, (7, 5))
    x = generator.standard_normal((7, 5, 4), dtype=np.float32)
    np.savez(place / "data.npz", tokens=tokens, x=x)
    words = [
        *("export", f"{code}:two", "--target", "onnx", "-o", place / "two", "--max-batch", 3),
        *("--example-shape", "1x5", "--example-dtype", "int64"),
        *("--example-shape", "1x5x4", "--example-dtype", "float32"),
    ]
    done = run(*words, "--calibrate", place / "data.npz")
    assert done.exit_code == 0, done.stderr
    inputs = Artifact.open(place / "two").network.inputs
    assert [(item.name, item.dtype) for item in inputs] == [
        ("tokens", "int64"),
        ("x", "float32"),
    ]
    np.savez(place / "short.npz", tokens=tokens)
    done = run(*words, "--force", "--calibrate", place / "short.npz")
    assert_only_one_line(done, "must hold one array for each input, tokens, x; it holds tokens")
    assert_only_one_line(run(*words[:-2], "--force"), "--example-dtype is given 1 times")


def test_a_folder_of_files_and_weights_of_its_own(code: Path, place: Path) -> None:
    folder = place / "data"
    folder.mkdir()
    images(folder / "a.npy", some(3))
    save_file({"anything": torch.from_numpy(some(4)) * 2}, folder / "b.safetensors")
    torch.manual_seed(5)
    net = Factory(code, "net").call()
    state = {
        name: torch.randn_like(value) for name, value in net.state_dict().items() if value.ndim
    }
    state["norm.running_var"] = torch.ones(4)
    save_file(state, place / "weights.safetensors")
    done = export(
        code,
        place / "net",
        *("--calibrate", folder, "--max-batch", 2, "--weights", place / "weights.safetensors"),
    )
    assert done.exit_code == 0, done.stderr
    saved = json.loads((place / "net" / "calibration.json").read_text())
    assert (saved["samples"], saved["batches"]) == (7, 2)
    plain = export(code, place / "plain", "--calibrate", folder, "--max-batch", 2)
    assert plain.exit_code == 0, plain.stderr
    files = [place / name / "model.onnx" for name in ("net", "plain")]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_dry_run_needs_no_data_and_writes_nothing(code: Path, place: Path) -> None:
    done = export(code, place / "net", "--scheme", "w4a8", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert re.search(r"conv\.weight +w4a8, stored as w8a8 +4x3x3x3 +124", done.stdout)
    done = export(code, place / "net", "--scheme", "w4a8-tensor", "--dry-run", "--json")
    stored = {row["tensor"]: row.get("stored_as") for row in json.loads(done.stdout)["tensors"]}
    assert stored["conv.weight"] == "w8a8-tensor"
    assert stored["conv.bias"] is None
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "scheme"),
    [("executorch", "w8a8-affine"), ("executorch", "w8a8-tensor-affine"), ("onnx", "w8a8-affine")],
)
def test_a_dry_run_refuses_what_the_export_would(
    code: Path, place: Path, target: str, scheme: str
) -> None:
    words = ["--scheme", scheme, "--dry-run", "--target", target]
    said = f"conv.weight: target {target} cannot hold {scheme}"
    assert_only_one_line(export(code, place / "net", *words), said)


def _lacking(net: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.items() if name != "head.bias"}


def _foreign(net: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return net | {"tail.weight": torch.zeros(1)}


def _misshapen(net: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return net | {"head.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_lacking, "is no state dict of Net: it lacks head.bias"),
        (_foreign, "it has tail.weight"),
        (_misshapen, "head.bias has shape [3], Net takes [2]"),
    ],
)
def test_weights_of_another_module(
    code: Path,
    place: Path,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    said: str,
) -> None:
    path = code.with_name("weights.safetensors")
    save_file(change(dict(Factory(code, "net").call().state_dict())), path)
    assert_only_one_line(export(code, place / "net", "--float", "--weights", path), said)
    path.write_bytes(b"no safetensors")
    assert_only_one_line(
        export(code, place / "net", "--float", "--weights", path), "cannot be read"
    )
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (some(0), "calibration data is empty"),
        (np.full((4, 3, 6, 6), 0.5, np.float32), "'x' is 0.5 everywhere"),
        (some() * np.float32("nan"), "batch 1: tensor 'x' holds infinities or NaN"),
        (some()[:, :, :5], "batch 1: input 'x' must be torch.float32 of shape [1 to 4, 3, 6, 6]"),
        (some().astype(np.float64), "got torch.float64"),
        (some().astype(">f4"), "byte order"),
        (np.array([{"an": "object"}], dtype=object), "x.npy: cannot be read"),
        (np.array(1.0, np.float32), "x.npy: x: is no array [N, ...] of inputs"),
    ],
)
def test_calibration_data_that_cannot_be_used(
    code: Path, place: Path, values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]", said: str
) -> None:
    data = images(code.with_name("x.npy"), values)
    done = export(code, place / "net", "--max-batch", 4, "--calibrate", data)
    assert_only_one_line(done, said)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("nowhere.npy", "nowhere.npy: no such file"),
        ("notes.txt", "notes.txt: calibration data are .npy"),
        ("empty", "holds no .npy, .npz, .safetensors file"),
        ("cut.npy", "cut.npy: cannot be read"),
        ("cut.npz", "cut.npz: cannot be read"),
        ("cut.safetensors", "cut.safetensors: cannot be read"),
        ("cut.json", "cut.json: is not valid JSON"),
        ("net.py:no_batches", "calibration data is empty"),
        ("net.py:one_tensor", "must return or yield mini-batches, it returned Tensor"),
        ("net.py:words", "mini-batch 1 must be a tensor"),
        ("net.py:broken_batches", "RuntimeError: no more images"),
        ("net.py:mute_batches", "raise Mute: Mute"),
        ("net.py:sparse", "batch 1: input 'x' must be a dense tensor"),
        ("pipe.npy", "pipe.npy: is no regular file"),
        ("pipes", "pipes/x.npz: is no regular file"),
        ("foreign.npz", "foreign.npz: x.txt: is no array [N, ...] of inputs"),
        ("net.py:batchez", "defines no function batchez"),
    ],
)
def test_calibration_data_that_are_none(code: Path, place: Path, data: str, said: str) -> None:
    folder = code.parent
    (folder / "empty").mkdir()
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipe.npy")
    os.mkfifo(folder / "pipes" / "x.npz")
    with ZipFile(folder / "foreign.npz", "w") as archive:
        archive.writestr("x.txt", "no array")
    for name in ("cut.npy", "cut.npz", "cut.safetensors", "cut.json"):
        (folder / name).write_bytes(b"\x93NUMPY cut off")
    done = export(code, place / "net", "--max-batch", 4, "--calibrate", folder / data)
    assert_only_one_line(done, said)
    assert list(place.iterdir()) == []


def line_of(text: str) -> int:
    return CODE[: CODE.index(text)].count("\n") + 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", (f"net.py:{line_of('return [][3]')}: return [][3]: IndexError",)),
        ("leaving", (f"net.py:{line_of('sys.exit')}: ", "exit enough")),
        ("odd", (f"net.py:{line_of('def odd():') + 1}: ", "BaseException: odd")),
        ("nothing", ("nothing must return a torch.nn.Module, it returned NoneType",)),
        ("missing", ("net.py: defines no function missing",)),
        ("number", ("net.py: number is no function",)),
        ("mute", (f"net.py:{line_of('def mute():') + 1}: raise Mute: Mute",)),
        ("table", ("Sequential cannot be traced", "want --example-dtype int64")),
        (
            "branching",
            ("Branching cannot be traced", f"net.py:{line_of('if x.sum() > 0')}: if x.sum() > 0:"),
        ),
    ],
)
def test_a_function_that_gives_no_traceable_module(
    code: Path, place: Path, name: str, words: tuple[str, ...]
) -> None:
    assert_only_one_line(export(code, place / "net", "--float", name=name), *words)
    assert list(place.iterdir()) == []


def test_sigterm_while_the_users_code_runs(code: Path, place: Path) -> None:
    words = ("export", f"{code}:terminated", "--target", "onnx", "-o", place / "net")
    done = edgekit(*words, "--example-shape", "1x3x6x6")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "edgekit: terminated\n")
    assert list(place.iterdir()) == []


def test_a_file_that_is_no_python(code: Path, place: Path) -> None:
    code.write_text("def net(:\n    pass\n")
    assert_only_one_line(export(code, place / "net"), "net.py:1: def net(:: SyntaxError")
    assert_only_one_line(export(code.with_name("none.py"), place / "net"), "none.py: no such file")
    done = run("export", code, "--target", "onnx")
    assert_only_one_line(done, "name a function of the file")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--example-shape", "3y4"), "'3y4' is no shape such as 1x3x32x32"),
        (("--example-shape", "99999x99999x99999"), "has more than"),
        (("--example-dtype", "float16"), "allowed are float32, int64"),
        (("--int4",), "--int4 is for language models: give a module --scheme w4a8"),
        (("--scheme", "w4g32"), "unknown scheme 'w4g32': allowed are float, w8a8 and w4a8"),
        (("--method", "guess"), "unknown calibration method 'guess'"),
        (("--target", "gguf"), "target gguf cannot hold networks of other kinds"),
        (("--context", "64"), "--context is for language models, not for a module"),
        (("--scheme", "w8a8-affine"), "target onnx cannot hold w8a8-affine"),
    ],
)
def test_options_that_do_not_fit(code: Path, place: Path, more: tuple[str, ...], said: str) -> None:
    data = ("--max-batch", "4", "--calibrate", f"{code}:batches")
    words = ["export", f"{code}:net", "--target", "onnx", *data, "-o", place / "net"]
    if more[0] != "--example-shape":
        words += ["--example-shape", "1x3x6x6"]
    assert_only_one_line(run(*words, *more), said)
    assert list(place.iterdir()) == []


def test_what_is_missing_is_said(code: Path, place: Path) -> None:
    assert_only_one_line(export(code, place / "net"), "need --calibrate")
    done = run("export", f"{code}:net", "--target", "onnx", "-o", place / "net")
    assert_only_one_line(done, "a module needs --example-shape")
    done = run("export", "lfm2-tiny", "--target", "onnx", "--example-shape", "1x3")
    assert_only_one_line(done, "--example-shape is for modules")


def test_a_recipe_that_matches_nothing(code: Path, place: Path) -> None:
    recipe = code.with_name("mine.toml")
    recipe.write_text('[[rules]]\npattern = "tail.*"\nscheme = "w8a8"\n')
    done = export(code, place / "net", "--recipe", recipe)
    assert_only_one_line(done, "mine.toml: rule 1: pattern 'tail.*' takes no layer", "conv.weight")
    assert list(place.iterdir()) == []
    recipe.write_text('[[rules]]\npattern = "conv.*"\nscheme = "w8a8"\n')
    done = export(
        code, place / "net", "--recipe", recipe, "--calibrate", f"{code}:batches", "--max-batch", 2
    )
    assert done.exit_code == 0, done.stderr
    shown = run("inspect", place / "net").stdout
    assert "layers as run: 1 on integers, 1 Gemm in float" in shown or (
        "1 on integers, 1 FusedGemm in float" in shown
    )


def test_an_existing_output_is_kept_without_force(code: Path, place: Path) -> None:
    assert export(code, place / "net", "--float").exit_code == 0
    before = (place / "net" / "edgekit.json").read_bytes()
    assert_only_one_line(export(code, place / "net", "--float"), "exists; give --force")
    assert (place / "net" / "edgekit.json").read_bytes() == before
    assert export(code, place / "net", "--float", "--force").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_export_leaves_nothing(code: Path, place: Path, stage: str) -> None:
    words = [
        *("export", f"{code}:net", "--target", "onnx", "--example-shape", "1x3x6x6"),
        *("--calibrate", f"{code}:batches", "--max-batch", "2", "-o", str(place / "net")),
    ]
    assert killed_at(stage, STAGES, words) == STAGES[: STAGES.index(stage) + 1]
    assert not (place / "net").exists()
    assert all(re.fullmatch(r"\.net\.\d+\.partial", path.name) for path in place.iterdir())
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in place.iterdir()] == ["net"]


def test_one_line_also_in_a_process_of_its_own(code: Path, place: Path) -> None:
    done = edgekit(*("export", f"{code}:broken", "--target", "onnx", "--example-shape", "1x3x6x6"))
    assert_one_line(done.returncode, done.stderr, "IndexError")
    assert list(place.iterdir()) == []
