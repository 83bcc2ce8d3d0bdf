"""`edgekit imatrix`: sums against transformers' own model, llama-imatrix's conventions."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from edgekit.cli import main
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.llama.imatrix import Imatrix
from edgekit.exporters.gguf.names import gguf_names
from edgekit.models.source import ModelSource, resolve_model
from edgekit.workflows.importance import imatrix_of_text

STORY = (
    "Once upon a time there was a boat <|im_end|> on a pond. A duck saw the boat, and the duck "
    "was glad.\n"
)
TEXT = STORY * 8
CONTEXT = 32


@cache
def tiny() -> ModelSource:
    return resolve_model("lfm2-tiny")


def folder() -> Path:
    found = tiny().folder
    assert found is not None
    return found


def expected_tokens() -> list[int]:
    """Special tokens' spellings are letters, and one final newline is left out."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return list(tokenizer.encode(TEXT.removesuffix("\n")).ids)


@contextmanager
def squares_of(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Sum the squares of what every linear of transformers' model is given, by its own name."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:  # noqa: ANN401
        def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + rows.double().square().sum(0)

        return add

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    yield sums
    for handle in handles:
        handle.remove()


def test_sums_are_those_of_transformers_model() -> None:
    tokens = expected_tokens()
    chunks = len(tokens) // CONTEXT
    assert chunks >= 4 and len(tokens) % CONTEXT  # the remainder is dropped
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    with squares_of(model) as sums, torch.inference_mode():
        for start in range(0, chunks * CONTEXT, CONTEXT):
            chunk = [tiny().config.bos_id, *tokens[start + 1 : start + CONTEXT]]
            model(torch.tensor([chunk]), use_cache=False)
    del sums["lm_head.weight"]  # llama-imatrix leaves the head out
    found = imatrix_of_text(tiny(), TEXT, "story", context=CONTEXT)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (chunks, CONTEXT, ("story",))
    names = gguf_names(tiny().config)
    assert found.entries.keys() == {names[name] for name in sums}
    for name, exact in sums.items():
        entry = found.entries[names[name]]
        assert entry.count == chunks * CONTEXT
        torch.testing.assert_close(torch.tensor(entry.sums), exact.float(), rtol=1e-4, atol=0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["imatrix", *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(TEXT)
    return path


def test_the_command_writes_what_it_says(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    done = run(
        "lfm2-tiny", "--text", text, "--context", CONTEXT, "--chunks", 2, "-o", out, "--json"
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts == {
        "file": str(out),
        "model": {"id": "lfm2-tiny", "revision": None},
        "text": "story.txt",
        "matrices": 46,
        "chunks": 2,
        "context": CONTEXT,
    }
    found = Imatrix.load(out)
    assert (len(found.entries), found.chunk_count, found.datasets) == (46, 2, ("story.txt",))
    assert len(GGUFReader(out).tensors) == 92


def test_the_command_names_its_file_after_the_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("lfm2-tiny", "--text", text, "--context", CONTEXT, "--chunks", 1)
    assert done.stdout == (
        f"wrote lfm2-tiny-imatrix.gguf: 46 matrices over {CONTEXT} tokens in chunks of {CONTEXT}\n"
    )
    assert (tmp_path / "lfm2-tiny-imatrix.gguf").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "1"], "--context 1: the model takes 2 to 2048 tokens"),
        (["--context", "4096"], "--context 4096: the model takes 2 to 2048 tokens"),
        (["--context", "2048"], "tokens, but a chunk is 2048: give a longer text"),
        (["--chunks", "0"], "--chunks"),
        (["-o", "story.txt/i.gguf"], "story.txt: is no folder"),
        (["-o", "story.txt"], "story.txt: exists; give --force"),
        (["--text", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_end_in_one_line_and_no_file(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("lfm2-tiny", "--text", text, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [text]


def test_random_weights_have_no_tokenizer() -> None:
    source = resolve_model("lfm2-350m", random_weights=True)
    with pytest.raises(EdgekitError, match="random weights have no tokenizer"):
        imatrix_of_text(source, TEXT, "")
