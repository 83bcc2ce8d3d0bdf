"""What stands in a model's place says what it is, and what to do, in one line."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.command_line import run

from edgekit.errors import EdgekitError
from edgekit.models.catalogue import catalogue
from edgekit.models.source import resolve_model
from edgekit.runtime.model_files import find_model_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5368709120\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of lfm2-tiny under a name with a space."""
    folder = catalogue()["lfm2-tiny"].folder
    assert folder is not None
    return Path(shutil.copytree(folder, tmp_path / "my model"))


def refused(place: Path, said: str) -> None:
    with pytest.raises(EdgekitError) as caught:
        _ = resolve_model(str(place)).checkpoint
    assert said in str(caught.value)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs install` and `git lfs"),
        (PAGE, "is a web page (HTML), not the file: download the file itself"),
        (b"", "is empty: its download did not finish; download it again"),
    ],
)
def test_what_stands_for_a_file_of_a_model(
    model: Path, name: str, content: bytes, said: str
) -> None:
    (model / name).write_bytes(content)
    done = run("export", model, "--target", "gguf", "-o", model.parent / "out")
    assert done.exit_code == 2, done.output
    assert f"{model / name}: {said}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def _only(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"content")

    return change


def _adapter(folder: Path) -> None:
    _only("adapter_model.safetensors")(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "LiquidAI/LFM2-350M"}')


def _shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    save_file({"a": torch.ones(2)}, folder / names[1])
    places = dict(zip("bac", names, strict=True))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _only("pytorch_model.bin"),
            "holds its weights as pytorch_model.bin, a pickle, which can run code and is not load",
        ),
        (
            _only("optimizer.pt", "pytorch_model.bin", "training_args.bin"),
            "holds its weights as pytorch_model.bin, a pickle",
        ),
        (_only("tf_model.h5"), "holds its weights as tf_model.h5, of another framework"),
        (
            _only("a.safetensors", "model-00001-of-00002.safetensors"),
            "holds model-00001-of-00002.safetensors, a shard",
        ),
        (_only("consolidated.safetensors"), "in the layout of their authors (consolidated.*)"),
        (_only("consolidated.00.pth", "params.json"), "(consolidated.*), with other names: give"),
        (_adapter, "is an adapter, not a model: give the model that it was trained on, with "),
        (_adapter, "my model'; that is LiquidAI/LFM2-350M"),
        (_shards, "2 of 3 shards missing: model-00001-of-00003.safetensors, model-00003-of-"),
        (_only("model-00001-of-00002.safetensors"), "a shard, and no model.safetensors.index"),
        (_only("weights.safetensors"), "holds weights.safetensors, but no model.safetensors: if"),
        (_only("model.safetensors.incomplete"), "is a download that did not finish"),
        (_only("tiny.gguf"), "tiny.gguf in it is a finished model for llama.cpp"),
        (_only(), "no model.safetensors and no model.safetensors.index.json"),
    ],
)
@pytest.mark.parametrize("configured", [True, False])
def test_a_folder_without_weights(
    model: Path, change: Callable[[Path], None], said: str, configured: bool
) -> None:
    change(model)
    if not configured:
        (model / "config.json").unlink()
        named = ("layout of", "consolidated", "adapter", "that is", "did not", "finished")
        if not any(word in said for word in named):
            said = "holds no config.json, so it is not a model folder"
    refused(model, said)


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "is a pipeline of diffusers, not a language model")


@pytest.mark.parametrize(
    ("method", "dtype", "name", "said"),
    [
        ("gptq", torch.int32, "q.qweight", "are already quantized by 'gptq'; give the original"),
        ("bitsandbytes", torch.uint8, "q.weight", "already quantized by 'bitsandbytes'"),
        (
            None,
            torch.int32,
            "q.qweight",
            "q.qweight has dtype I32; supported: BF16, F16, F32; such",
        ),
        (None, torch.float8_e4m3fn, "q.weight", "F8_E4M3; supported: BF16, F16, F32; such are"),
    ],
)
def test_weights_that_are_quantized_already(
    model: Path, method: str | None, dtype: torch.dtype, name: str, said: str
) -> None:
    if method is not None:
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4}
        (model / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(4, 4).to(dtype)}, model / "model.safetensors")
    refused(model, said)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("config.json"), io.BytesIO())


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("m.gguf", _bytes(b"GGUF\x03\0\0\0"), "is a finished model for llama.cpp, which `edgekit"),
        ("blob", _bytes(b"GGUF\x03\0\0\0"), "is a finished model for llama.cpp"),
        ("m.pte", _bytes(b"\0\0\0\0ET12"), "is a finished model for ExecuTorch"),
        ("m.onnx", _bytes(b"\x08\x07"), "is a finished model for ONNX Runtime"),
        ("m.zip", _zip, "is an archive: unpack it"),
        ("m.tar", _tar, "is an archive: unpack it"),
        ("m.bin", lambda path: torch.save({}, path), "is a pickle of torch's, which can run code"),
        ("model.safetensors", _bytes(b"\x02\0\0\0\0\0\0\0{}"), "is a file of weights; give the"),
        ("m.safetensors.part", _bytes(b"x"), "is a download that did not finish"),
        ("m.gguf", _bytes(POINTER), "is a Git LFS pointer"),
        ("m.gguf", _bytes(PAGE), "is a web page (HTML)"),
        ("m.gguf", _bytes(b""), "is empty"),
        ("notes", _bytes(b"hello"), "is a file; give the folder that holds config.json"),
    ],
)
def test_a_file_in_a_models_place(
    tmp_path: Path, name: str, write: Callable[[Path], object], said: str
) -> None:
    write(tmp_path / name)
    refused(tmp_path / name, said)
    done = run("quantize", tmp_path / name)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("content", [POINTER, PAGE, b""])
@pytest.mark.parametrize("end", ["gguf", "onnx", "pte"])
def test_what_stands_for_an_engines_file(tmp_path: Path, end: str, content: bytes) -> None:
    path = tmp_path / f"model.{end}"
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match="Git LFS pointer|web page|is empty"):
        find_model_file(path)


@pytest.mark.parametrize("command", ["run", "bench", "compare", "verify"])
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("lfm2-tiny", "lfm2-tiny-executorch-int8"),
        ("LiquidAI/LFM2-350M", "lfm2-350m-executorch-int8"),
        (None, "my model-executorch-int8"),
    ],
)
def test_a_model_where_an_artifact_is_wanted(
    model: Path, command: str, name: str | None, made: str
) -> None:
    given = str(model) if name is None else name
    done = run(command, given, *(["hello"] if command == "run" else []))
    assert done.exit_code == 2, done.output
    quoted = f"'{given}'" if " " in given else given
    assert (
        f"edgekit: {given}: is a model, not an artifact: make one first, `edgekit export {quoted} "
        f"--target executorch`, which is then {made}\n"
    ) == done.stderr
