"""`edgekit eval`: what is scored, against transformers' loss, and how it refuses."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from support.command_line import assert_only_one_line
from torch import nn
from transformers import Lfm2ForCausalLM

import edgekit.models
from edgekit.cli import main
from edgekit.common.files import LONGEST_TEXT_BYTES, read_text
from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.models.tokenizer import Tokenizer
from edgekit.runtime.engines.engine import OneSequenceEngine, load_engine
from edgekit.runtime.engines.torch.decoder import TorchEngine
from edgekit.runtime.evaluation.evaluate import cut, evaluate, evaluate_each, tokenize
from edgekit.workflows.api import export_model

FOLDER = Path(edgekit.models.__file__).parent / "lfm2_tiny"
CONTEXT = 64


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def transformers_losses() -> list[float]:
    """Losses of transformers' model, by the conventions of llama-perplexity written out anew."""
    model = Lfm2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(FOLDER)
    tokens = tokenizer.encode(TEXT[:-1])
    losses = []
    for start in range(0, len(tokens) - CONTEXT + 1, CONTEXT):
        chunk = torch.tensor(tokens[start : start + CONTEXT])
        chunk[0] = 1
        with torch.inference_mode():
            rows = model(chunk[None]).logits[0]
        for place in range(CONTEXT // 2 + 1, CONTEXT):
            losses.append(float(nn.functional.cross_entropy(rows[place - 1], chunk[place])))
    return losses


def test_the_models_perplexity_is_that_of_transformers(transformers_losses: list[float]) -> None:
    result = evaluate("lfm2-tiny", TEXT, context=CONTEXT, threads=1)
    assert (result.engine, result.reference, result.divergence) == ("torch", None, None)
    assert result.tokens == len(transformers_losses) == result.chunks * (CONTEXT // 2 - 1)
    assert result.perplexity.value == pytest.approx(
        math.exp(np.mean(transformers_losses)), rel=1e-4
    )
    error = np.std(transformers_losses) / math.sqrt(len(transformers_losses) - 1)
    assert result.perplexity.error == pytest.approx(result.perplexity.value * error, rel=1e-3)


def test_an_artifact_against_its_model(tiny_artifact: Path) -> None:
    """Held against an independent sum over the engine's own rows, token by token."""
    result = evaluate(str(tiny_artifact), TEXT, "lfm2-tiny", context=CONTEXT, chunks=2, threads=1)
    chunks = cut(tokenize(Tokenizer.load(FOLDER), TEXT), CONTEXT, 2, bos=1)
    ours: list[tuple[torch.Tensor, int]] = []
    theirs: list[tuple[torch.Tensor, int]] = []
    with (
        load_engine("executorch", tiny_artifact / "model.pte", 1) as engine,
        TorchEngine.from_model("lfm2-tiny", CONTEXT, 1) as reference,
    ):
        for chunk in chunks:
            for rows, model in ((ours, engine), (theirs, reference)):
                model.reset()
                for place, token in enumerate(chunk[:-1]):
                    logits = torch.from_numpy(model.decode(token)).double().log_softmax(-1)
                    if place >= CONTEXT // 2:
                        rows.append((logits, chunk[place + 1]))
    kld = np.mean(
        [float((p.exp() * (p - q)).sum()) for (q, _), (p, _) in zip(ours, theirs, strict=True)]
    )
    loss = np.mean([-float(q[target]) for q, target in ours])
    assert result.divergence is not None
    assert result.divergence.kld.value == pytest.approx(kld, rel=0.2)  # prefill sums otherwise
    assert 0 < result.divergence.kld.value < 0.003
    assert result.perplexity.value == pytest.approx(math.exp(loss), rel=0.005)
    assert result.reference == "lfm2-tiny"


def test_an_artifact_against_itself_has_no_divergence(tiny_artifact: Path) -> None:
    name = str(tiny_artifact)
    result = evaluate(name, TEXT, name, context=CONTEXT, chunks=1, threads=1)
    assert result.divergence is not None
    assert result.divergence.kld_at["100"] == 0
    assert result.divergence.reference_perplexity == result.perplexity


def test_several_are_scored_as_each_alone(tiny_artifact: Path) -> None:
    names = [str(tiny_artifact), "lfm2-tiny"]
    together = evaluate_each(names, TEXT, "lfm2-tiny", context=CONTEXT, chunks=1, threads=1)
    alone = [
        evaluate(name, TEXT, "lfm2-tiny", context=CONTEXT, chunks=1, threads=1) for name in names
    ]
    assert together == alone


@pytest.mark.parametrize("first", [0, 5, 11])
def test_scoring_in_one_pass_is_scoring_token_by_token(first: int) -> None:
    tokens = list(range(100, 112))
    with TorchEngine.from_model("lfm2-tiny", 16, 1) as engine:
        engine.prefill([5, 6, 7])  # a state that must be forgotten
        whole = engine.score(tokens, first)
        assert engine.position == len(tokens)
        stepwise = OneSequenceEngine.score(engine, tokens, first)
        assert engine.position == len(tokens)
    assert whole.shape == (len(tokens) - first, engine.vocab_size)
    np.testing.assert_allclose(whole, stepwise, atol=1e-4)


@pytest.mark.parametrize("first", [-1, 3])
def test_a_first_row_that_is_not_there_is_refused(first: int) -> None:
    with (
        TorchEngine.from_model("lfm2-tiny", 16, 1) as engine,
        pytest.raises(EdgekitError, match=f"must be 0 to 2, not {first}"),
    ):
        engine.score([1, 2, 3], first)


def test_chunks_are_whole_and_begin_with_bos() -> None:
    assert cut(range(10, 21), 4, None, 1) == [[1, 11, 12, 13], [1, 15, 16, 17]]
    assert cut(range(10, 21), 4, 1, None) == [[10, 11, 12, 13]]
    assert cut(range(10, 18), 4, 9, 1) == [[1, 11, 12, 13], [1, 15, 16, 17]]


def test_special_tokens_in_a_text_are_letters_and_one_newline_is_dropped() -> None:
    tokenizer = Tokenizer.load(FOLDER)
    ids = tokenize(tokenizer, "a <|im_end|> b\n\n")
    assert ids[0] == tokenizer.bos_id
    assert set(ids[1:]).isdisjoint({0, 1, 2, 6, 7})
    assert tokenizer.decode(ids) == "a <|im_end|> b\n"
    assert 7 in tokenizer.encode("a <|im_end|> b")  # encoding as usual is as it was


def test_json_and_table(text_file: Path, tiny_artifact: Path) -> None:
    arguments = (tiny_artifact, "--text", text_file, "--reference", "lfm2-tiny", "--context", 64)
    done = run(*arguments, "--chunks", 1, "-t", 1, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(done.stdout)
    assert (facts["chunks"], facts["tokens"]) == (1, 31)
    assert facts["engine"]["name"] == "executorch"
    table = run(*arguments, "--chunks", 1, "-t", 1).stdout
    assert f"| {facts['perplexity']['value']:.4f} |" in table.replace("  ", " ")
    assert f"{facts['divergence']['kld']['value']:.6f}" in table
    assert f"{facts['divergence']['kld']['percentiles']['99.9']:.6f}" in table


def test_bits_per_byte_are_of_the_scored_text(text_file: Path) -> None:
    """Of what the scored tokens decode to, counted by the tokenizer's own decoder."""
    found = evaluate("lfm2-tiny", TEXT, context=64, chunks=2, threads=1)
    tokenizer = Tokenizer.load(FOLDER)
    ids = tokenizer.encode_plain(TEXT.removesuffix("\n"))
    scored = [ids[start + 33 : start + 64] for start in (0, 64)]
    count = sum(len(tokenizer.decode(part).encode()) for part in scored)
    bits = found.tokens * math.log2(found.perplexity.value)
    assert found.tokens == sum(map(len, scored))
    assert found.bits_per_byte == pytest.approx(bits / count)
    table = run("lfm2-tiny", "--text", text_file, "--context", 64, "--chunks", 2, "-t", 1).stdout
    assert f"| bits per byte of text | {found.bits_per_byte:.4f} |" in re.sub(" +", " ", table)


def test_a_score_of_few_tokens_has_no_error(tiny_artifact: Path, text_file: Path) -> None:
    """Of one token there is no deviation, and `± 0` would say that it is exact."""
    given = (tiny_artifact, "--text", text_file, "--reference", "lfm2-tiny", "--context", 4)
    arguments = (*given, "--chunks", 1, "-t", 1)
    facts = json.loads(run(*arguments, "--json").stdout)
    assert facts["tokens"] == 1
    assert facts["perplexity"]["error"] is None
    assert {facts["divergence"][key]["error"] for key in ("kld", "delta_p", "same_top")} == {None}
    text = run(*arguments).stdout
    assert "1 token scored" in text
    assert "±" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        ("abc".encode("utf-16"), ["is not UTF-8 but UTF-16"]),
        (b"\n", ["has 1 token,", "a chunk is 512"]),
        (b"short", ["tokens, but a chunk is 512", "smaller --context"]),
        (b"abc\xffdef", ["is not UTF-8", "byte 0xff at offset 3"]),
    ],
)
def test_a_text_that_cannot_be_scored(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert_only_one_line(run("lfm2-tiny", "--text", path), *words)


def test_a_text_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with path.open("wb") as file:
        file.truncate(LONGEST_TEXT_BYTES + 1)
    with pytest.raises(EdgekitError, match=f"longer than {LONGEST_TEXT_BYTES >> 20} MiB"):
        read_text(path)
    with pytest.raises(EdgekitError, match="/dev/zero: is no regular file"):
        read_text(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "missing.txt"], ["missing.txt", "cannot be read"]),
        (["--context", "3"], ["--context must be at least 4"]),
        (["--context", "0"], ["--context must be at least 4"]),
        (["--chunks", "0"], ["--chunks"]),
        (["--threads", "0"], ["threads must be at least 1"]),
        (["--reference", "no-such-model"], ["no-such-model"]),
    ],
)
def test_arguments_that_make_no_sense(
    text_file: Path, arguments: list[str], words: list[str]
) -> None:
    assert_only_one_line(run("lfm2-tiny", "--text", text_file, *arguments), *words)


def test_more_context_than_the_file_has(tiny_artifact: Path, text_file: Path) -> None:
    done = run(tiny_artifact, "--text", text_file, "--context", 1024)
    assert_only_one_line(done, "holds 512 positions", "1024", "smaller --context")


def test_a_reference_that_reads_other_tokens(
    tiny_artifact: Path, tmp_path: Path, text_file: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(FOLDER, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(content))
    done = run(tiny_artifact, "--text", text_file, "--reference", other, "--context", 64)
    assert_only_one_line(done, "read the text as different tokens")


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TorchEngine, tokens: list[int], first: int) -> NDArray[np.float32]:
        return np.full((len(tokens) - first, self.vocab_size), np.nan, np.float32)

    monkeypatch.setattr(TorchEngine, "score", broken)
    with pytest.raises(EdgekitError, match="lfm2-tiny: its logits, .* not finite"):
        evaluate("lfm2-tiny", TEXT, context=CONTEXT, chunks=1, threads=1)


def test_a_gguf_of_others_is_scored_as_the_artifact_it_was_taken_from(
    tmp_path: Path, text_file: Path
) -> None:
    artifact = export_model("lfm2-tiny", tmp_path / "a", target="gguf", recipe="int8", context=64)
    bare = tmp_path / "bare.gguf"
    shutil.copy(artifact.model_path, bare)
    results = [
        evaluate(str(path), TEXT, "lfm2-tiny", context=CONTEXT, chunks=2, threads=1)
        for path in (artifact.folder, bare)
    ]
    assert [one.engine for one in results] == ["gguf", "gguf"]
    assert results[0].divergence == results[1].divergence
    assert results[0].divergence is not None and 0 < results[0].divergence.kld.value < 0.003
