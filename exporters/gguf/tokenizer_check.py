"""Does llama.cpp make the same token ids of a text as the model's own tokenizer?

By LFM2's expression, asked for each code point in between others, llama-cpp-python 0.3.36 and
tokenizers 0.23 differ in letters that only Unicode 16 has, and in none that Unicode 15 has.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit.common.last_words import engine_on
from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.gguf.corpus import TEXTS, texts_with
from edgekit.formats.gguf.vocabulary import llama_token_ids
from edgekit.models.tokenizer import Tokenizer

_SHOWN = 8  # ids of each side, and characters of a text, in a message
_TEXT_SHOWN = 40


def check_tokenizer(path: Path, folder: Path, texts: Sequence[str] = TEXTS) -> dict[str, int]:
    """Compare the tokenizer of a GGUF with that of a model folder; return what was compared.

    Over `texts`, texts with the added tokens, and each token's own text. VerificationError names
    the first text whose ids differ.
    """
    import llama_cpp

    tokenizer = Tokenizer.load(folder)
    added = tuple(token.content for token in tokenizer.backend.get_added_tokens_decoder().values())
    corpus = [*texts, *texts_with(added), *_token_texts(tokenizer)]
    if tokenizer.backend.normalizer is not None:
        # llama.cpp takes a text as it is: only one that is normalised already has the same ids.
        corpus = [tokenizer.backend.normalizer.normalize_str(text) for text in corpus]
    expected = tokenizer.backend.encode_batch(corpus)
    total = 0
    with _vocabulary(path) as vocabulary:
        for text, encoding in zip(corpus, expected, strict=True):
            found = llama_token_ids(
                llama_cpp, vocabulary, text.encode(), add_special=True, parse_special=True
            )
            if found != encoding.ids:
                raise VerificationError(f"tokenizer: {_difference(text, encoding.ids, found)}")
            total += len(found)
    return {"texts": len(corpus), "tokens": total}


def _token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token that is whole characters."""
    ids = sorted(tokenizer.backend.get_vocab().values())
    texts = tokenizer.backend.decode_batch([[i] for i in ids], skip_special_tokens=False)
    return [text for text in texts if "\ufffd" not in text]


def _difference(text: str, expected: Sequence[int], found: Sequence[int]) -> str:
    """Show the first place where the ids differ."""
    pairs = zip(expected, found, strict=False)
    same = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    begin = min(len(expected), len(found)) if same is None else same
    shown = repr(text) if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]!r}..."
    sides = [list(ids[begin : begin + _SHOWN]) for ids in (expected, found)]
    return (
        f"the ids of {shown} differ from token {begin} on: the model's are {sides[0]}, "
        f"llama.cpp's {sides[1]}"
    )


@contextmanager
def _vocabulary(path: Path) -> Iterator[Any]:  # a pointer of llama.cpp's
    """Load a file's tokenizer and nothing else of it."""
    import llama_cpp

    llama_cpp.llama_log_set(_hear_nothing(), ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    with engine_on("gguf", path):
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model is None:
            raise EdgekitError(f"{path}: llama.cpp cannot read its tokenizer")
        try:
            yield llama_cpp.llama_model_get_vocab(model)
        finally:
            llama_cpp.llama_model_free(model)


_callbacks: list[Any] = []  # llama.cpp keeps the pointer, so the function must live as long


def _hear_nothing() -> Any:  # noqa: ANN401 - a ctypes function
    import llama_cpp

    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return _callbacks[0]
