"""A tokenizer.json as the metadata that llama.cpp's tokenizer is made of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.common.files import load_json_object
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.architectures import (
    GgufArchitecture,
    find_architecture,
    split_names,
)
from edgekit.formats.gguf.writer import Value
from edgekit.models.config import ModelConfig
from edgekit.models.tokenizer import BYTE_ALPHABET, TOKENIZER_FILE, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Of `enum llama_token_type` (include/llama.h)."""

STAND_IN = "random weights; the tokenizer is a stand-in of the vocabulary's size"
_MODEL = "gpt2"  # llama.cpp's word for byte-level BPE


def tokenizer_metadata(folder: Path, config: ModelConfig) -> dict[str, Value]:
    """Return the keys `tokenizer.*` for the tokenizer of a model folder.

    EdgekitError where llama.cpp has no such tokenizer; whether it makes the same ids of a text,
    only `tokenizer_check` says. A text whose characters are decomposed is composed (NFC) by the
    tokenizer.json of some models, and never by llama.cpp.
    """
    file = folder / TOKENIZER_FILE
    tokenizer = Tokenizer.load(folder)
    raw = load_json_object(file)
    if raw.get("normalizer") not in (None, {"type": "NFC"}):
        raise EdgekitError(
            f"{file}: has a normalizer other than NFC; llama.cpp's byte-level BPE has none"
        )
    tokens, kinds = _tokens(file, raw, config.vocab_size)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": _MODEL,
        "tokenizer.ggml.pre": _pre_tokenizer(file, raw, find_architecture(config)),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": _merges(file, raw),
        **_special_ids(config),
        **_added_at_the_ends(file, tokenizer, config),
    }
    if tokenizer.template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.template.text
    return metadata


def stand_in_metadata(config: ModelConfig) -> dict[str, Value]:
    """Return a tokenizer of the model's size that llama.cpp loads and nobody should use.

    For random weights without a tokenizer: engines and benchmarks take token ids.
    """
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = np.full(config.vocab_size, UNUSED, np.int32)
    special = {config.bos_id, *config.eos_ids}
    if config.pad_id is not None:
        special.add(config.pad_id)
    for i in special:
        tokens[i], kinds[i] = f"<|{i}|>", CONTROL
    free = (i for i in range(config.vocab_size) if i not in special)
    for letter, i in zip(BYTE_ALPHABET, free, strict=False):
        tokens[i], kinds[i] = letter, NORMAL
    return {
        "tokenizer.ggml.model": _MODEL,
        "tokenizer.ggml.pre": find_architecture(config).llama3_split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b"],  # llama.cpp wants one
        **_special_ids(config),
        "tokenizer.ggml.add_bos_token": True,
    }


def _pre_tokenizer(file: Path, raw: Mapping[str, Any], architecture: GgufArchitecture) -> str:
    """Return llama.cpp's name of how the text is split, recognised by the steps themselves."""
    named = split_names(architecture)
    found = _split(_steps(raw.get("pre_tokenizer")))
    if found not in named:
        raise EdgekitError(
            f"{file}: splits text in a way that llama.cpp has no name for here; known are "
            f"{', '.join(named.values())}"
        )
    return named[found]


def _split(steps: Sequence[Mapping[str, Any]]) -> str:
    """Return how a text is split in the words of `split_names`, in others where it has none."""
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    own_expression = bool(last.get("use_regex", True))
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        return ""
    if kinds == ["ByteLevel"] and own_expression:
        return "ByteLevel"
    if kinds == ["Digits", "ByteLevel"] and own_expression and steps[0].get("individual_digits"):
        return "Digits ByteLevel"
    isolated = (steps[0].get("behavior"), steps[0].get("invert")) == ("Isolated", False)
    if kinds == ["Split", "ByteLevel"] and not own_expression and isolated:
        pattern = steps[0].get("pattern")
        return f"Split {pattern.get('Regex')}" if isinstance(pattern, dict) else ""
    return ""


def _steps(part: object) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence" and isinstance(part.get("pretokenizers"), list):
        return [step for inner in part["pretokenizers"] for step in _steps(inner)]
    return [part]


def _tokens(file: Path, raw: Mapping[str, Any], size: int) -> tuple[list[str], Any]:
    """Return every token's text and type; ids that no token has are filled, as converters do."""
    found: dict[int, tuple[str, int]] = {i: (text, NORMAL) for text, i in _vocab(raw).items()}
    for token in raw.get("added_tokens") or ():
        kind = CONTROL if token["special"] else USER_DEFINED
        found[token["id"]] = token["content"], kind
    if max(found, default=-1) >= size:
        raise EdgekitError(
            f"{file}: has the token id {max(found)}, the model's vocabulary only {size}"
        )
    filled = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size)]
    texts = [text for text, _ in filled]
    # llama.cpp ends the process at a token that stands twice or is empty
    if len(set(texts)) != size or "" in texts:
        raise EdgekitError(f"{file}: a token's text is empty or stands for two ids")
    return texts, np.array([kind for _, kind in filled], np.int32)


def _vocab(raw: Mapping[str, Any]) -> dict[str, int]:
    return dict(_model(raw).get("vocab") or {})


def _merges(file: Path, raw: Mapping[str, Any]) -> list[str]:
    """Return merges as "first second", which is how both spellings of tokenizer.json mean them."""
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in _model(raw).get("merges") or ()
    ]
    if not merges or any(merge.count(" ") != 1 for merge in merges):
        raise EdgekitError(f"{file}: its merges are none that llama.cpp can hold")
    return merges


def _model(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    model = raw.get("model")
    return model if isinstance(model, dict) else {}


def _special_ids(config: ModelConfig) -> dict[str, Value]:
    """A second token that ends a text is llama.cpp's end of a turn; it knows no third."""
    ids: dict[str, Value] = {
        "tokenizer.ggml.bos_token_id": config.bos_id,
        "tokenizer.ggml.eos_token_id": config.eos_ids[0],
    }
    if len(config.eos_ids) > 1:
        ids["tokenizer.ggml.eot_token_id"] = config.eos_ids[1]
    if config.pad_id is not None:
        ids["tokenizer.ggml.padding_token_id"] = config.pad_id
    return ids


def _added_at_the_ends(file: Path, tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """Say which tokens are put around every text, by putting them around one."""
    bare, whole = tokenizer.encode("a", add_special=False), tokenizer.encode("a")
    for bos in (True, False):
        for eos in (False, True):
            if whole == [config.bos_id] * bos + bare + [config.eos_ids[0]] * eos:
                return {
                    "tokenizer.ggml.add_bos_token": bos,
                    "tokenizer.ggml.add_eos_token": eos,
                }
    raise EdgekitError(
        f"{file}: puts the tokens {_around(whole, bare)} around a text; llama.cpp can add "
        f"{config.bos_id} before and {config.eos_ids[0]} after it"
    )


def _around(whole: Sequence[int], bare: Sequence[int]) -> str:
    return json.dumps([token for token in whole if token not in bare])
