"""What is done with a model beside its export, with each family: calibrated codes, a budget,
training, scores, text and an importance matrix, held against transformers' model of the same.
"""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.command_line import done, run
from support.small_families import random_weights, small_config, small_folder, theirs
from torch import nn
from transformers import PreTrainedModel

import edgekit
from edgekit.exporters.gguf.llama.imatrix import Imatrix
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.readback import read_weights
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.formats.artifact.read import Artifact
from edgekit.models.codes import CodesFile
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.models.weights import floats
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.runtime.evaluation.evaluate import evaluate

FAMILIES = ["llama-bands", "qwen3"]
"""A head of its own and bands of rotation; a tied head and norms of queries and keys."""
CONTEXT = 32


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(family, tmp_path_factory.mktemp(family) / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def reference(family: str) -> PreTrainedModel:
    config = small_config(family)
    return theirs(config, random_weights(config))


def assert_export_holds(folder: Path, family: str, codes: Path, out: Path) -> None:
    """llama.cpp's file has these codes, and computes what they do."""
    done("export", folder, "--target", "gguf", "--codes", codes, "--context", 64, "-o", out)
    artifact, config = Artifact.open(out), small_config(family)
    assert artifact.manifest.verification["verified"]
    held = CodesFile.open(codes, config)
    for name, values in read_weights("gguf", artifact.model_path, config):
        assert torch.equal(values, floats(held[name])), name


def test_gptq(family: str, folder: Path, text: Path, tmp_path: Path) -> None:
    codes = tmp_path / "q.safetensors"
    record = done("quantize", folder, "--int4", "--calibrate", text, "-o", codes)
    steps = {step["step"]: step["kld"]["value"] for step in record["gains"]["steps"]}
    assert 0 < steps["gptq"] < steps["rtn"]
    held = CodesFile.open(codes, small_config(family))
    assert held.about.method == "gptq"
    if HEAD not in small_config(family).tensor_shapes():
        assert torch.equal(floats(held[HEAD]), floats(held[EMBEDDING]))
    assert_export_holds(folder, family, codes, tmp_path / "out")


def test_jlcm(family: str, folder: Path, text: Path, tmp_path: Path) -> None:
    codes = tmp_path / "q.safetensors"
    words = ("--scheme", "cb3", "--method", "jlcm", "--calibrate", text)
    record = done("quantize", folder, *words, "-o", codes)
    steps = [step["kld"]["value"] for step in record["gains"]["steps"]]
    assert 0 < steps[-1] < steps[0]
    assert CodesFile.open(codes, small_config(family)).about.method == "jlcm"
    assert_export_holds(folder, family, codes, tmp_path / "out")


def test_bits_within_a_budget(family: str, folder: Path, tmp_path: Path) -> None:
    codes = tmp_path / "q.safetensors"
    done("quantize", folder, "--bits", "6", "-o", codes)
    config = small_config(family)
    held = CodesFile.open(codes, config)
    stored = [held[name] for name in config.tensor_shapes()]  # a tied head is the embedding
    bits = (
        8
        * sum(value.nbytes for value in stored)
        / sum(value.numel() for value in map(floats, stored))
    )
    assert 5 < bits <= 6
    assert_export_holds(folder, family, codes, tmp_path / "out")


def test_training(family: str, folder: Path, tmp_path: Path) -> None:
    """Codes out of transformers' own model, trained while it rounds."""
    model = reference(family)
    qat = edgekit.prepare(model, "int4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([Tokenizer.load(folder).encode(TEXT)[:64]])
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        qat.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    codes = tmp_path / "q.safetensors"
    qat.save(codes, str(folder), resolve_model(str(folder)).checkpoint.sha256())
    assert_export_holds(folder, family, codes, tmp_path / "out")


def test_scores(family: str, folder: Path) -> None:
    """By llama-perplexity's conventions: second halves of chunks, each from a fresh state."""
    found = evaluate(str(folder), TEXT, context=CONTEXT, chunks=4, threads=1)
    tokens = Tokenizer.load(folder).encode(TEXT)[: 4 * CONTEXT]
    model, losses = reference(family), []
    for chunk in torch.tensor(tokens).view(4, CONTEXT):
        with torch.inference_mode():
            rows = model(chunk[None]).logits[0, CONTEXT // 2 : -1]
        losses += nn.functional.cross_entropy(
            rows, chunk[CONTEXT // 2 + 1 :], reduction="none"
        ).tolist()
    assert found.tokens == len(losses)
    assert found.perplexity.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize(
    ("target", "margin"),
    [("gguf", 0.05), ("onnx", 1e-3)],  # llama.cpp's cache is float16
)
def test_text(target: str, margin: float, family: str, folder: Path, tmp_path: Path) -> None:
    """The tokens that transformers' model finds likeliest, until another is as likely."""
    out, prompt = tmp_path / "out", "Once upon a time"
    words = ("--target", target, "--scheme", "float", "--context", 64)
    done("export", folder, *words, "-o", out)
    greedy = ("--temperature", 0, "--repeat-penalty", 1, "--raw")
    result = run("run", out, prompt, *greedy, "--max-tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    tokenizer = Tokenizer.load(folder)
    ids, model = tokenizer.encode(prompt), reference(family)
    expected: list[int] = []
    for _ in range(12):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + expected])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        if best - second < margin:
            break
        expected.append(int(logits.argmax()))
        if expected[-1] == small_config(family).eos_ids[0]:
            break
    assert expected
    text = "".join(line.get("text", "") for line in lines[:-1]) or lines[-1]["text"]
    assert text.startswith(tokenizer.decode(expected).rstrip("\ufffd"))


def test_importance(family: str, folder: Path, text: Path, tmp_path: Path) -> None:
    """Sums of squares of what each linear of transformers' model is given."""
    out = tmp_path / "imatrix.gguf"
    done("imatrix", folder, "--text", text, "--context", CONTEXT, "--chunks", 3, "-o", out)
    model = reference(family)
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, torch.zeros(())) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" != HEAD:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    tokens = Tokenizer.load(folder).encode(TEXT)[: 3 * CONTEXT]
    for start, end in pairwise(range(0, 4 * CONTEXT, CONTEXT)):
        with torch.inference_mode():
            model(torch.tensor([tokens[start:end]]))
    names, found = gguf_names(small_config(family)), Imatrix.load(out)
    assert found.entries.keys() == {names[name] for name in sums}
    for name, squares in sums.items():
        mine = torch.from_numpy(found.entries[names[name]].sums)
        assert torch.allclose(mine.double(), squares, rtol=1e-4), name
