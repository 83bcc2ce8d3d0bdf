"""`--calibrate`: codes by GPTQ on a text, what each step gained, and runs that are broken off."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.brain_surgeon import NEAREST, steps_from_elimination
from support.command_line import done, run
from support.gguf_models import small_model
from torch import Tensor

from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.read import Artifact
from edgekit.metrics.logits import kld
from edgekit.models import layerwise
from edgekit.models.activations import unrounded
from edgekit.models.codes import CodesFile
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import resolve_model
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.gptq import Inputs, gptq
from edgekit.quantize.names import EMBEDDING
from edgekit.quantize.schemes.names import Scheme, parse_scheme
from edgekit.quantize.storage import load_quantized, load_with_about
from edgekit.quantize.tensor import QuantizedTensor
from edgekit.workflows import calibrate as module

STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories" / "train.txt"
LAYERS = 2
LINEARS = 12
"""Matrices in the two layers of the small model."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(TEXT[start:] for start in range(0, 400, 40)))
    return path


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The codes of a run that nothing broke off."""
    path = tmp_path_factory.mktemp("whole") / "q.safetensors"
    done("quantize", model, "--int4", "--calibrate", text, "-o", path)
    return path


def same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_the_steps_and_the_file(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    record = done("quantize", model, "--int4", "--calibrate", text, "-o", out)
    gains = record["gains"]
    assert [step["step"] for step in gains["steps"]] == ["rtn", "mse", "gptq"]
    source = resolve_model(str(model))
    codes = CodesFile.open(out, source.config)
    assert codes.about.method == "gptq"
    assert codes.about.facts["calibration_text"] == "text.txt"
    assert codes.about.facts["held_out_kld_gptq"] == gains["steps"][2]["kld"]["value"]
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]

    # The figures again, by a way of their own.
    texts = module.read_texts(source, text)
    assert not {tuple(chunk) for chunk in texts.calibration} & {
        tuple(chunk) for chunk in texts.held_out
    }
    read = float_reader(source.config, source.checkpoint)
    found = []
    for chunk in texts.held_out:
        batch, start = torch.tensor([chunk[:-1]]), torch.zeros(1, dtype=torch.long)
        exact, rounded = (
            build_eager(source.config, reader, len(chunk), unrounded)
            .all_logits(batch, start)[len(chunk) // 2 :]
            .numpy()
            for reader in (read, codes.__getitem__)
        )
        found.append(kld(exact, rounded))
    assert gains["steps"][2]["kld"]["value"] == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_the_first_linear_sees_the_quantized_embedding(
    model: Path, whole: Path, text: Path
) -> None:
    """The inputs of one matrix made by hand: nothing but the embedding and a norm are before it."""
    source = resolve_model(str(model))
    contents, name = load_quantized(whole), "model.layers.0.conv.in_proj.weight"
    embedding = contents[EMBEDDING]
    assert isinstance(embedding, QuantizedTensor)
    assert torch.equal(
        embedding.codes,
        quantize_weight(parse_scheme("w8"), source.checkpoint.tensor(EMBEDDING)).codes,
    )
    norm = source.checkpoint.tensor("model.layers.0.operator_norm.weight").float()

    def normed(table: Tensor, tokens: Sequence[int]) -> Tensor:
        x = table[list(tokens)]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + source.config.norm_eps) * norm

    tokens = [token for chunk in module.read_texts(source, text).calibration for token in chunk]
    seen = normed(embedding.dequantize(), tokens)
    exact = normed(source.checkpoint.tensor(EMBEDDING).float(), tokens)
    weight, scheme = source.checkpoint.tensor(name).float(), parse_scheme("w4g32")
    found = contents[name]
    assert isinstance(found, QuantizedTensor)
    assert steps_from_elimination(found, weight, seen, exact @ weight.t(), scheme) < NEAREST
    assert steps_from_elimination(found, weight, exact, exact @ weight.t(), scheme) > NEAREST


def test_export_does_the_same_in_one_go(
    model: Path, text: Path, whole: Path, tmp_path: Path
) -> None:
    common = ("--target", "gguf", "--context", "64")
    done("export", model, "--int4", "--calibrate", text, *common, "-o", tmp_path / "one")
    done("export", model, "--codes", whole, *common, "-o", tmp_path / "two")
    one, two = (Artifact.open(tmp_path / name).decoder for name in ("one", "two"))
    assert one.files == two.files
    assert one.codes_sha256 == two.codes_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_method_that_changes_nothing_is_called_what_it_is(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """At 8 bits ranges of least squared error are not searched for."""
    given = ("quantize", model, "--int8", "--method", "mse")
    record = done(*given, "--calibrate", text, "-o", tmp_path / "one")
    assert [step["step"] for step in record["gains"]["steps"]] == ["rtn"]
    done(*given, "-o", tmp_path / "two")
    methods = []
    for name in ("one", "two"):
        about = load_with_about(tmp_path / name)[1]
        assert about is not None
        methods.append(about.method)
    assert methods == ["rtn", "rtn"]


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_other_methods_are_measured_too(
    model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    given = ("quantize", model, "--int4", "--method", method)
    record = done(*given, "--calibrate", text, "-o", tmp_path / "one")
    assert [step["step"] for step in record["gains"]["steps"]][-1] == method
    assert "gains" not in done(*given, "-o", tmp_path / "two")
    one, two = (load_quantized(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        other = two[name]
        if isinstance(value, QuantizedTensor) and isinstance(other, QuantizedTensor):
            assert torch.equal(value.dequantize(), other.dequantize()), name


class Broken:
    """GPTQ that is interrupted at one of its calls."""

    def __init__(self, at: int | None) -> None:
        self.calls, self.at = 0, at

    def __call__(self, weight: Tensor, inputs: Inputs, scheme: Scheme) -> QuantizedTensor:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return gptq(weight, inputs, scheme)


def test_a_run_that_was_broken_off_goes_on(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q.safetensors"
    arguments = ("quantize", model, "--int4", "--calibrate", text, "-o", out)
    monkeypatch.setattr(module, "gptq", Broken(at=LINEARS - 1))
    stopped = run(*arguments)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".q.safetensors.calibration"]
    again = Broken(at=None)
    monkeypatch.setattr(module, "gptq", again)
    done(*arguments)
    assert 0 < again.calls < LINEARS
    assert same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


@pytest.mark.parametrize("states", ["kept", "lost", "damaged"])
def test_the_hidden_states_are_kept_too(
    model: Path,
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: str,
) -> None:
    """With them the layers that are done need not be run again."""
    out = tmp_path / "q.safetensors"
    arguments = ("quantize", model, "--int4", "--calibrate", text, "-o", out)
    monkeypatch.setattr(module, "gptq", Broken(at=LINEARS))
    assert run(*arguments).exit_code == 130
    (file,) = tmp_path.glob(".q.safetensors.calibration/*/states-*.safetensors")
    if states == "lost":
        file.unlink()
    elif states == "damaged":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(module, "gptq", gptq)
    passed = set()
    run_to = layerwise.Stream.leaving

    def leaving(self: layerwise.Stream, index: int, half: int) -> Iterator[Tensor]:
        passed.add(index)
        return run_to(self, index, half)

    monkeypatch.setattr(layerwise.Stream, "leaving", leaving)
    done(*arguments)
    assert passed == ({1} if states == "kept" else {0, 1})
    assert same(out, whole)


def test_a_layer_that_was_damaged_meanwhile_is_made_again(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q.safetensors"
    arguments = ("quantize", model, "--int4", "--calibrate", text, "-o", out)
    monkeypatch.setattr(module, "gptq", Broken(at=LINEARS - 1))
    assert run(*arguments).exit_code == 130
    (kept,) = tmp_path.glob(".q.safetensors.calibration/*/layer-0.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1  # in a tensor: still a file of codes
    kept.write_bytes(content)
    monkeypatch.setattr(module, "gptq", gptq)
    done(*arguments)
    assert same(out, whole)


def test_a_killed_run_goes_on(model: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    arguments = ("quantize", str(model), "--int4", "--calibrate", str(text), "-o", str(out))
    process = subprocess.Popen([sys.executable, "-m", "edgekit", *arguments])
    while not list(tmp_path.glob(".q.safetensors.calibration/*/layer-0.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    done(*arguments)
    assert same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


def test_what_was_kept_of_another_run_is_not_used(
    model: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "q.safetensors", tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    monkeypatch.setattr(module, "gptq", Broken(at=LINEARS))
    assert run("quantize", model, "--int4", "--calibrate", other, "-o", out).exit_code == 130
    for layer in (tmp_path / ".q.safetensors.calibration").glob("*/layer-0.safetensors"):
        layer.write_bytes(b"damaged")
    counted = Broken(at=None)
    monkeypatch.setattr(module, "gptq", counted)
    done("quantize", model, "--int4", "--calibrate", text, "-o", out)
    assert counted.calls == LINEARS
    assert same(out, whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\x01\x00\x01", "is not UTF-8: byte 0xff at offset 0"),
        (b"\xff\xfe\x00\x01", "is not UTF-8 but UTF-16 or UTF-32"),
        (b"Too short.", "tokens; calibration needs at least 512"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_texts_that_are_none(
    model: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    for command in (
        ("quantize", model, "-o", tmp_path / "q"),
        ("export", model, "--target", "gguf", "--context", "64", "-o", tmp_path / "q"),
    ):
        result = run(*command, "--int4", "--calibrate", path)
        assert result.exit_code == 2
        assert f"{path}: " in result.stderr
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert [each.name for each in tmp_path.iterdir()] == ["text.txt"] * (content is not None)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_file(), reason="the stories of ../shared/data are not there")
def test_gptq_halves_the_divergence(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(STORIES.read_text()[:200_000])
    record = done("quantize", "lfm2-tiny", "--int4", "--calibrate", text, "-o", tmp_path / "q")
    rtn, mse, best = (step["kld"]["value"] for step in record["gains"]["steps"])
    assert mse < rtn
    assert best < 0.5 * rtn


def test_a_run_that_keeps_nothing_leaves_no_folder(tmp_path: Path) -> None:
    """As where the disk is full before a layer is done."""
    with pytest.raises(OSError, match="full"), module.workspace_of(tmp_path / "q") as folder:
        (folder / "digest").mkdir(parents=True)
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="full"), module.workspace_of(tmp_path / "q") as folder:
        (folder / "digest").mkdir(parents=True)
        (folder / "digest" / "layer-0.safetensors").touch()
        raise OSError("full")
    assert (tmp_path / ".q.calibration" / "digest" / "layer-0.safetensors").exists()
