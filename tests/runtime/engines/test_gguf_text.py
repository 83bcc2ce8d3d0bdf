"""The tokenizer inside a GGUF, as llama.cpp reads it, against the tokenizer.json it was made of."""

from pathlib import Path

import pytest
from support.foreign_gguf import FOLDER, write_foreign_gguf

from edgekit.errors import EdgekitError
from edgekit.exporters.verify.reference_text import TEXT
from edgekit.models.tokenizer import Tokenizer
from edgekit.runtime.engines.gguf import tokenizer as gguf_tokenizer
from edgekit.runtime.engines.gguf.tokenizer import GgufTokenizer

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces, 12345 and 3.14\n\n\tdef f(x): return x",
    "naïve façade, 東京 شكرا 🙂👩‍🚀 e\u0301",
    "<|im_start|>user\nhello<|im_end|>\n",
    "\x00\x07 control",
    TEXT,
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q8_0")


@pytest.fixture(scope="module")
def ours(path: Path) -> GgufTokenizer:
    return GgufTokenizer(path)


@pytest.fixture(scope="module")
def theirs() -> Tokenizer:
    return Tokenizer.load(FOLDER)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_tokenizer_json(
    ours: GgufTokenizer, theirs: Tokenizer, text: str
) -> None:
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, add_special=False) == theirs.encode(text, add_special=False)
    assert ours.encode_plain(text) == theirs.encode_plain(text)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_become_the_text_again(ours: GgufTokenizer, theirs: Tokenizer, text: str) -> None:
    ids = theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)
    stream = ours.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == theirs.decode(ids)


def test_every_token_has_the_bytes_of_the_tokenizer_json(
    ours: GgufTokenizer, theirs: Tokenizer
) -> None:
    for token in range(theirs.vocab_size):
        assert ours.decode([token]) == theirs.decode([token])


def test_a_character_is_kept_back_until_its_last_byte(
    ours: GgufTokenizer, theirs: Tokenizer
) -> None:
    stream, expected = ours.stream(), theirs.stream()
    for token in theirs.encode("🙂", add_special=False)[:-1]:
        assert stream.push(token) == expected.push(token)
    assert stream.flush() == expected.flush() == "\ufffd"


def test_tokens_that_are_not_there_have_no_text(ours: GgufTokenizer) -> None:
    assert ours.decode([-1, 1 << 31, 4096]) == ""


def test_a_token_longer_than_the_first_guess(
    ours: GgufTokenizer, theirs: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tokenizer, "_LONGEST_PIECE", 1)
    assert ours.decode(theirs.encode("Once upon")) == "Once upon"


def test_the_conversation_is_that_of_the_chat_template(
    ours: GgufTokenizer, theirs: Tokenizer
) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert ours.chat(messages) == theirs.chat(messages)


def test_special_tokens(ours: GgufTokenizer, theirs: Tokenizer) -> None:
    assert (ours.bos_id, ours.adds_bos) == (theirs.bos_id, theirs.adds_bos) == (1, True)
    # llama.cpp ends at <|endoftext|>, 2, as well: by its text
    assert set(theirs.eos_ids) <= set(ours.eos_ids) == {2, 7}


def test_a_file_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = GgufTokenizer(write_foreign_gguf(tmp_path / "m.gguf", template=False))
    with pytest.raises(EdgekitError, match="has no chat template; give the text as it is"):
        tokenizer.chat([{"role": "user", "content": "Hi"}])


def test_a_file_without_a_tokenizer_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.gguf"
    content = path.read_bytes()
    field = b"tokenizer.ggml.model\x08\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00gpt2"
    assert field in content
    other.write_bytes(content.replace(field, field[:-4] + b"none"))
    with pytest.raises(EdgekitError, match="m.gguf: holds no tokenizer; name a tokenizer.json"):
        GgufTokenizer(other)


def test_a_lone_surrogate_is_no_text(ours: GgufTokenizer) -> None:
    with pytest.raises(EdgekitError, match="lone surrogate"):
        ours.encode("\ud800")
