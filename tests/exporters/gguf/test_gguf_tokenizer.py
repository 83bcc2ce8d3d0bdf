"""The tokenizer inside a GGUF: recognised, refused, and compared with Hugging Face's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support.gguf_models import small_model, write_gguf_of

from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.gguf.architectures import LLAMA3_SPLIT, SINGLE_DIGITS_SPLIT
from edgekit.exporters.gguf.corpus import TEXTS, texts_with
from edgekit.exporters.gguf.tokenizer import tokenizer_metadata
from edgekit.exporters.gguf.tokenizer_check import check_tokenizer
from edgekit.formats.gguf.file import GgufFile
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model
from edgekit.models.tokenizer import Tokenizer

WIKITEXT = Path(__file__).parents[4] / "shared" / "data" / "wikitext-2"

Document = dict[str, Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "small")


def edit(model: Path, change: Callable[[Document], None]) -> None:
    """Change a model's tokenizer.json."""
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def written(model: Path) -> Path:
    return write_gguf_of(resolve_model(str(model)), "int8", model.parent / "out")[0]


def metadata(model: Path) -> dict[str, object]:
    return dict(tokenizer_metadata(model, ModelConfig.load(model)))


def split_by(expression: str | None) -> Callable[[Document], None]:
    """Replace how a tokenizer splits text: by an expression, or by ByteLevel's own."""

    def change(document: Document) -> None:
        split, byte_level = document["pre_tokenizer"]["pretokenizers"]
        if expression is None:
            document["pre_tokenizer"] = byte_level | {"use_regex": True}
        else:
            split["pattern"]["Regex"] = expression

    return change


def test_the_bundled_model_splits_as_lfm2_does() -> None:
    folder = resolve_model("lfm2-tiny").folder
    assert folder is not None
    assert metadata(folder)["tokenizer.ggml.pre"] == "lfm2"


@pytest.mark.parametrize(
    ("expression", "name"),
    [(LLAMA3_SPLIT, "lfm2"), (LLAMA3_SPLIT.replace("{1,3}", ""), "qwen2"), (None, "gpt-2")],
)
def test_expressions_that_llama_cpp_has(model: Path, expression: str | None, name: str) -> None:
    """Each gives the ids of Hugging Face's tokenizers over the whole corpus."""
    edit(model, split_by(expression))
    path = written(model)
    assert GgufFile.open(path).metadata["tokenizer.ggml.pre"] == name
    compared = check_tokenizer(path, model)
    assert compared["texts"] > 4000
    assert compared["tokens"] > 10_000


def single_digits(document: Document) -> None:
    """As SmolLM2's tokenizer.json has it."""
    byte_level = document["pre_tokenizer"]["pretokenizers"][1] | {"use_regex": True}
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def composing(document: Document) -> None:
    """As Qwen3's has it."""
    split_by(SINGLE_DIGITS_SPLIT)(document)
    document["normalizer"] = {"type": "NFC"}


@pytest.mark.parametrize(("change", "name"), [(single_digits, "smollm"), (composing, "qwen2")])
def test_steps_that_llama_cpp_has(
    model: Path, change: Callable[[Document], None], name: str
) -> None:
    """A text is given in the form that the tokenizer would compose it to."""
    edit(model, change)
    path = written(model)
    assert GgufFile.open(path).metadata["tokenizer.ggml.pre"] == name
    assert check_tokenizer(path, model)["tokens"] > 10_000
    decomposed = "re\u0301sume\u0301"
    if name == "qwen2":
        assert check_tokenizer(path, model, [decomposed])["texts"] > 1
        assert len(Tokenizer.load(model).encode(decomposed)) == len(
            Tokenizer.load(model).encode("r\u00e9sum\u00e9")
        )


def normalize(document: Document) -> None:
    document["normalizer"] = {"type": "NFKC"}


def prefix_space(document: Document) -> None:
    document["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def split_twice(document: Document) -> None:
    document["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = True


def remove_matches(document: Document) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


def split_by_text(document: Document) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"String": " "}


def no_split(document: Document) -> None:
    document["pre_tokenizer"] = None


def digits(document: Document) -> None:
    document["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Digits", "individual_digits": True}
    )


def end_twice(document: Document) -> None:
    post = document["post_processor"]
    post["single"] = [post["single"][0], post["single"][0], post["single"][1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (normalize, "has a normalizer"),
        (prefix_space, "splits text in a way"),
        (split_twice, "splits text in a way"),
        (remove_matches, "splits text in a way"),
        (split_by_text, "splits text in a way"),
        (split_by(r"\s+"), "known are gpt-2, smollm, lfm2, qwen2"),
        (no_split, "splits text in a way"),
        (digits, "splits text in a way"),
        (end_twice, "puts the tokens [1, 1] around a text"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(
    model: Path, change: Callable[[Document], None], words: str
) -> None:
    edit(model, change)
    with pytest.raises(EdgekitError, match="tokenizer.json: ") as refusal:
        metadata(model)
    assert words in str(refusal.value)


def test_a_tokenizer_that_adds_nothing_or_an_end(model: Path) -> None:
    found = metadata(model)
    assert found["tokenizer.ggml.add_bos_token"] is True

    def nothing(document: Document) -> None:
        document["post_processor"] = None

    edit(model, nothing)
    found = metadata(model)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is False
    check_tokenizer(written(model), model)


def test_a_token_with_the_name_of_a_gap_is_refused(model: Path) -> None:
    """llama.cpp ends the process where a text stands for two tokens."""

    def clash(document: Document) -> None:
        token = document["added_tokens"][-1] | {"id": 4096, "content": "[PAD4097]"}
        document["added_tokens"].append(token)

    edit(model, clash)
    with pytest.raises(EdgekitError, match="stands for two ids"):
        metadata(model)


def test_a_token_beyond_the_vocabulary_is_refused(model: Path) -> None:
    def beyond(document: Document) -> None:
        document["added_tokens"].append(
            document["added_tokens"][-1] | {"id": 4100, "content": "x" * 9}
        )

    edit(model, beyond)
    with pytest.raises(EdgekitError, match="has the token id 4096|has the token id 4100"):
        metadata(model)


def test_added_tokens_that_are_not_special_are_compared_too(model: Path) -> None:
    def add(document: Document) -> None:
        token = document["added_tokens"][-1] | {"special": False}
        for i, text in enumerate(("<think>", "||", "日本語")):
            document["added_tokens"].append(token | {"id": 4096 + i, "content": text})

    edit(model, add)
    path = written(model)
    assert GgufFile.open(path).array("tokenizer.ggml.token_type").numbers()[4096:].tolist() == [
        4,
        4,
        4,
        5,
    ]
    check_tokenizer(path, model)


def strip_left(document: Document) -> None:
    document["added_tokens"][7]["lstrip"] = True


def another_merge(document: Document) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[40] = merges[40], merges[0]


@pytest.mark.parametrize("change", [strip_left, another_merge, split_by(None)])
def test_other_ids_are_named(model: Path, change: Callable[[Document], None]) -> None:
    """The file is of one tokenizer, the folder then holds another."""
    path = written(model)
    edit(model, change)
    with pytest.raises(VerificationError) as failure:
        check_tokenizer(path, model)
    message = str(failure.value)
    assert message.startswith("tokenizer: the ids of ")
    assert "the model's are [" in message
    assert "llama.cpp's [" in message
    assert message.isprintable()


def test_the_corpus_has_what_it_says() -> None:
    text = "".join(TEXTS)
    for piece in (
        "I'm",
        "\u200d",
        "今天",
        "コーヒー",
        "السلام",
        "नमस्ते",
        "สวัสดี",
        "e\u0301",
        "\x1b",
        "\x00",
    ):
        assert piece in text
    for piece in (
        "\t\t",
        "\r\n",
        "   ",
        "1234567",
        "\ufffd",
        "\U0010ffff",
        "<|not_a_token|>",
        "'LL",
    ):
        assert piece in text
    assert "" in TEXTS
    assert len(set(TEXTS)) == len(TEXTS)
    assert "a <x> b<x>c" in "".join(texts_with(("<x>",)))


@pytest.mark.slow
def test_wikitext_gets_the_same_ids(tmp_path: Path) -> None:
    """In slices that begin and end anywhere."""
    files = sorted(WIKITEXT.rglob("*test*")) if WIKITEXT.is_dir() else []
    if not files:
        pytest.skip("no WikiText here")
    text = files[0].read_text(encoding="utf-8", errors="ignore")
    source = resolve_model("lfm2-tiny")
    assert source.folder is not None
    path, _ = write_gguf_of(source, "int8", tmp_path)
    slices = [text[begin : begin + 997] for begin in range(0, len(text), 997)]
    assert check_tokenizer(path, source.folder, slices)["tokens"] > 100_000


def test_a_tokenizer_trained_otherwise(model: Path) -> None:
    """With merges as texts, as older files have them, and ignore_merges as LFM2's has it."""

    def older(document: Document) -> None:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
        document["model"]["ignore_merges"] = True

    edit(model, older)
    tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    check_tokenizer(written(model), model)


def test_a_file_without_a_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "config.json", tmp_path / "some.gguf")
    with pytest.raises(EdgekitError, match="cannot read its tokenizer"):
        check_tokenizer(tmp_path / "some.gguf", model)
