"""Text to token ids and back, with the model's own special tokens and chat template."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError, one_line
from edgekit.models.chat_template import ChatTemplate
from edgekit.models.config_keys import token_ids

TOKENIZER_FILE = "tokenizer.json"


class TextTokenizer(Protocol):
    """What running a model needs of its tokenizer; `Tokenizer` is one, llama.cpp has others.

    `bos_id` is None where there is none; `eos_ids` are the tokens that end a generation.
    """

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` begins a text with the bos token."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text, special tokens by their spelling."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which the spelling of a special token is only letters."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        ...

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt for a conversation; encode it with `add_special=False`."""
        ...

    def stream(self) -> "TextStream":
        """Return a decoder that turns ids into text one by one."""
        ...


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer (Hugging Face tokenizer.json); build by `load`.

    `eos_ids` are the tokens that end a generation; `template` is None for a model without one.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: tuple[int, ...]
    template: ChatTemplate | None
    special_text: Mapping[str, str]

    @classmethod
    def load(cls, place: Path) -> "Tokenizer":
        """Read a model or artifact folder; corrupt or contradicting files are refused by name.

        `place` may also be the tokenizer.json itself. bos and eos come from generation_config.json,
        config.json or tokenizer_config.json beside it, the first that names them.
        """
        file = place if place.is_file() else place / TOKENIZER_FILE
        folder = file.parent
        backend = _load_backend(file)
        files = [
            load_json_object(folder / name) if (folder / name).is_file() else {}
            for name in ("generation_config.json", "config.json", "tokenizer_config.json")
        ]
        special = _special_text(files[-1])
        bos = _first_ids(backend, folder, files[:2], special, "bos")
        eos = _first_ids(backend, folder, files[:2], special, "eos")
        return cls(backend, bos[0] if bos else None, eos, ChatTemplate.load(folder), special)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text; `add_special` lets the tokenizer add its bos token."""
        utf8(text)
        return list(self.backend.encode(text, add_special_tokens=add_special).ids)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which the spelling of a special token is only letters.

        So llama.cpp's tools read files. The tokenizer still adds its bos token.
        """
        utf8(text)
        return list(self._plain.encode(text).ids)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy: the choice is a property of the backend, which other threads may be using."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = True
        return copy

    @property
    def adds_bos(self) -> bool:
        """Whether a text begins with the bos token."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens; U+FFFD for broken UTF-8."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt for a conversation; encode it with `add_special=False`."""
        return render_chat(self.template, messages, self.special_text)

    def stream(self) -> "TextStream":
        """Return a decoder that turns ids into text one by one."""
        added = self.backend.get_added_tokens_decoder().items()
        hidden = {index for index, token in added if token.special}

        def piece(token: int) -> bytes:
            text = None if token in hidden else self.backend.id_to_token(token)
            return b"" if text is None else _token_bytes(text)

        return TextStream(piece)


class TextStream:
    """Incremental decoding: the pushes and the flush together are `decode` of all ids.

    A token is a run of bytes, so this is a UTF-8 decoder behind a lookup; an unfinished character
    is kept back until its last byte, and work per token is constant.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        """Start an empty text; `piece` gives the bytes of a token, none for a special one."""
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, token: int) -> bytes:
        """Return what one token stands for, maybe a part of a character; nothing if special."""
        return self._piece(token)

    def push(self, token: int) -> str:
        """Return the text that one more token completes, maybe empty."""
        return self._utf8.decode(self._piece(token))

    def flush(self) -> str:
        """End the text: U+FFFD for a character that was left unfinished, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def utf8(text: str) -> bytes:
    """Return a text's bytes; EdgekitError for one that has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EdgekitError("the text is not valid UTF-8 (it holds a lone surrogate)") from error


def render_chat(
    template: ChatTemplate | None,
    messages: Sequence[Mapping[str, Any]],
    special_text: Mapping[str, str],
) -> str:
    """Return the prompt for a conversation; EdgekitError for a model without a template."""
    if template is None:
        raise EdgekitError("the model has no chat template; give the text as it is (`raw`)")
    return template.render(messages, special_text)


def _byte_table() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(0x100 + index): byte for index, byte in enumerate(hidden)
    }


BYTE_ALPHABET = _byte_table()


def _token_bytes(text: str) -> bytes:
    """Bytes of one token; one outside the alphabet (an added token) is its own UTF-8."""
    try:
        return bytes(BYTE_ALPHABET[char] for char in text)
    except KeyError:
        return text.encode()


def _load_backend(file: Path) -> tokenizers.Tokenizer:
    content = load_json_object(file)
    if _decoder_types(content.get("decoder")) != ["ByteLevel"]:
        raise EdgekitError(f"{file}: is not a byte-level tokenizer; only those are supported")
    try:
        backend = tokenizers.Tokenizer.from_buffer(file.read_bytes())
        backend.decode(backend.encode("a b").ids)  # some faults only show in use
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and Rust panics, which are BaseExceptions
        raise EdgekitError(f"{file}: not a usable tokenizer: {one_line(error, 120)}") from error
    if not backend.get_vocab_size():
        raise EdgekitError(f"{file}: the vocabulary is empty")
    # padding or truncation stored by a trainer would change every prompt without a word
    backend.no_padding()
    backend.no_truncation()
    return backend


def _decoder_types(decoder: object) -> list[object]:
    if not isinstance(decoder, dict):
        return []
    if decoder.get("type") == "Sequence" and isinstance(decoder.get("decoders"), list):
        return [kind for part in decoder["decoders"] for kind in _decoder_types(part)]
    return [decoder.get("type")]


def _special_text(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of tokenizer_config.json's special tokens (bos_token, eos_token, ...)."""
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _first_ids(
    backend: tokenizers.Tokenizer,
    folder: Path,
    files: Iterable[Mapping[str, Any]],
    special: Mapping[str, str],
    kind: str,
) -> tuple[int, ...]:
    key = f"{kind}_token_id"
    found = next((file[key] for file in files if file.get(key) is not None), None)
    if found is None and f"{kind}_token" in special:
        found = backend.token_to_id(special[f"{kind}_token"])
    ids = token_ids(found, key)
    for token in ids:
        if backend.id_to_token(token) is None:
            raise EdgekitError(f"{folder}: {key} {token} is not in {TOKENIZER_FILE}")
    return ids
