"""The tokenizer that a GGUF holds, in llama.cpp's own code: the ids are what its programs use."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama

from edgekit.common.last_words import engine_on
from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import GgufFile
from edgekit.formats.gguf.vocabulary import llama_token_ids
from edgekit.models.chat_template import ChatTemplate
from edgekit.models.tokenizer import TextStream, render_chat, utf8
from edgekit.runtime.engines.gguf import library as llama_library
from edgekit.runtime.engines.gguf.decoder import end_ids, load_model
from edgekit.runtime.engines.gguf.facts import open_checked

_TEMPLATE = "tokenizer.chat_template"
_LONGEST_PIECE = 256


def open_tokenizer(path: Path) -> "GgufTokenizer":
    """Open a file's tokenizer; EdgekitError where it has none."""
    return GgufTokenizer(path)


class GgufTokenizer:
    """A `TextTokenizer` over a file's vocabulary, which is loaded without the weights.

    `eos_ids` are all tokens at which llama.cpp ends a text. The chat template is the file's.
    """

    def __init__(self, path: Path) -> None:
        """Load a file's vocabulary; EdgekitError where it has none."""
        file = open_checked(path)
        llama_library.start()
        with engine_on("gguf", path):
            model = load_model(path, vocab_only=True)
        self._release = weakref.finalize(self, llama.llama_model_free, model)
        self._vocab = llama.llama_model_get_vocab(model)
        if llama.llama_vocab_type(self._vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            raise EdgekitError(f"{path}: holds no tokenizer; name a tokenizer.json: `tokenizer`")
        self._size = llama.llama_vocab_n_tokens(self._vocab)
        self.bos_id = _known(llama.llama_vocab_bos(self._vocab))
        self.eos_ids = end_ids(self._vocab)
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))
        self._template = _template(file)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of a text; `add_special` lets llama.cpp add bos as the file wants it."""
        return self._encode(text, add_special, parse_special=True)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text in which the spelling of a special token is only letters."""
        return self._encode(text, add_special=True, parse_special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens; U+FFFD for broken UTF-8."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt for a conversation; encode it with `add_special=False`."""
        return render_chat(self._template, messages, self._special_text())

    def stream(self) -> TextStream:
        """Return a decoder that turns ids into text one by one."""
        return TextStream(self._piece)

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return llama_token_ids(
            llama, self._vocab, utf8(text), add_special=add_special, parse_special=parse_special
        )

    def _piece(self, token: int) -> bytes:
        """Return a token's bytes, none for a special one."""
        if not 0 <= token < self._size:  # llama.cpp would end the process
            return b""
        size = _LONGEST_PIECE
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _special_text(self) -> dict[str, str]:
        """Return what templates call bos_token and so on."""
        ids = {
            "bos_token": llama.llama_vocab_bos(self._vocab),
            "eos_token": llama.llama_vocab_eos(self._vocab),
            "pad_token": llama.llama_vocab_pad(self._vocab),
        }
        return {
            name: llama.llama_vocab_get_text(self._vocab, token).decode(errors="replace")
            for name, token in ids.items()
            if _known(token) is not None
        }


def _known(token: int) -> int | None:
    return None if token < 0 else token


def _template(file: GgufFile) -> ChatTemplate | None:
    text = file.metadata.get(_TEMPLATE)
    if text is None:
        return None
    if not isinstance(text, str):
        raise EdgekitError(f"{file.path}: its {_TEMPLATE} must be a text")
    return ChatTemplate(text, f"{file.path}: {_TEMPLATE}")
