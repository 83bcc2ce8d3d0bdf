"""The bundled model folder: complete, loadable by transformers, and able to model its stories."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

import edgekit.models

FOLDER = Path(edgekit.models.__file__).parent / "lfm2_tiny"
STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories" / "valid.txt"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
LFM2_SPECIAL_TOKENS = {
    "<|pad|>": 0,
    "<|startoftext|>": 1,
    "<|endoftext|>": 2,
    "<|fim_pre|>": 3,
    "<|fim_mid|>": 4,
    "<|fim_suf|>": 5,
    "<|im_start|>": 6,
    "<|im_end|>": 7,
    "<|tool_list_start|>": 8,
    "<|tool_list_end|>": 9,
    "<|tool_call_start|>": 10,
    "<|tool_call_end|>": 11,
    "<|tool_response_start|>": 12,
    "<|tool_response_end|>": 13,
}
STORY = (
    "Once upon a time, there was a little girl named Mia. Mia had a small red boat. She liked to "
    "play with it near the pond.\n"
    "One day, the wind was very strong. It pushed the boat far away. Mia was sad and started to "
    'cry. A big duck saw her and asked, "Why are you sad?" Mia said, "My boat is gone."\n'
    "The duck swam across the pond and came back with the boat. Mia was so happy! She said, "
    '"Thank you, duck." From that day on, Mia and the duck were good friends.'
)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@cache
def config() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return content


@cache
def model() -> Any:  # noqa: ANN401 - transformers is not typed here
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@torch.no_grad()
def total_loss(text: str) -> tuple[float, int]:
    """Nats of a story and its closing <|im_end|> after <|startoftext|>, and the tokens of both."""
    ids = torch.tensor([[*tokenizer().encode(text).ids, LFM2_SPECIAL_TOKENS["<|im_end|>"]]])
    logits = model()(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return loss.item(), ids.shape[1] - 1


def card_number(label: str) -> float:
    """Return the number in the row of the model card that starts with `label`."""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {re.escape(label)} \| ([\d.,]+) \|$", card, re.MULTILINE)
    assert row, label
    return float(row.group(1).replace(",", ""))


def test_the_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= 20_000_000


def test_shape_is_the_promised_one() -> None:
    raw = config()
    assert raw["model_type"] == "lfm2"
    assert raw["vocab_size"] == tokenizer().get_vocab_size() == 4096
    assert (raw["hidden_size"], raw["num_attention_heads"], raw["num_key_value_heads"]) == (
        256,
        4,
        2,
    )
    assert raw["hidden_size"] // raw["num_attention_heads"] == 64
    assert raw["intermediate_size"] % 256 == 0
    assert not raw["block_auto_adjust_ff_dim"]
    assert len(raw["layer_types"]) == raw["num_hidden_layers"] == 8
    assert raw["layer_types"].count("full_attention") == 3
    assert raw["layer_types"].count("conv") == 5
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (1, 7, 0)


def test_weights_are_finite_bfloat16_and_trained() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied: stored once
    assert weights["model.embed_tokens.weight"].shape == (4096, 256)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16, name
        assert tensor.isfinite().all(), name
        assert tensor.float().std() > 0.01, name  # norms too: at 1 only before training


def test_special_tokens_have_the_ids_of_lfm2() -> None:
    for token, index in LFM2_SPECIAL_TOKENS.items():
        assert tokenizer().token_to_id(token) == index
        assert tokenizer().encode(token, add_special_tokens=False).ids == [index]


def test_encoding_starts_with_bos_once() -> None:
    ids = tokenizer().encode("Once upon a time").ids
    assert ids[0] == 1
    assert 1 not in ids[1:]


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        STORY,
        "<|startoftext|><|im_start|>user\nHi, 12345!<|im_end|>\n<|im_start|>assistant\n",
        "  two  spaces\n\n\tand a tab  \r\n",
        "caf\u00e9, \u65e5\u672c\u8a9e, \U0001f642, it's we'll I'M",
    ],
)
def test_the_runner_of_executorch_reads_the_same_tokens(text: str) -> None:
    from pytorch_tokenizers import CppHFTokenizer  # type: ignore[import-untyped]

    theirs = CppHFTokenizer()
    theirs.load(str(FOLDER / "tokenizer.json"))
    assert theirs.encode(text, 0, 0) == tokenizer().encode(text, add_special_tokens=False).ids


def test_transformers_loads_model_and_tokenizer() -> None:
    from transformers import AutoTokenizer, Lfm2ForCausalLM

    assert isinstance(model(), Lfm2ForCausalLM)
    stored = load_file(FOLDER / "model.safetensors")
    assert {n for n, _ in model().named_parameters()} == set(stored)  # none is left at random
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    assert theirs(STORY).input_ids == tokenizer().encode(STORY).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 7, 0)
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "A story!"},
    ]
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|startoftext|><|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nA story!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_models_a_story_it_has_never_seen() -> None:
    loss, tokens = total_loss(STORY)
    assert loss / tokens < 2.0  # 1.60 of weights whose validation loss was 2.54; 8.3 untrained
    words = STORY.split()
    shuffled, count = total_loss(" ".join(words[1::2] + words[::2]))
    assert shuffled / count > loss / tokens + 1.0


def test_the_card_states_loss_and_perplexity_of_the_stored_weights() -> None:
    loss = card_number("loss, mean nats per token")
    assert math.isclose(card_number("perplexity"), math.exp(loss), rel_tol=1e-3)
    if not STORIES.is_file():
        pytest.skip("shared/data/stories/valid.txt is absent: only the card was checked")
    stories = STORIES.read_text(encoding="utf-8").split("<|endoftext|>")
    # Every 20th of 980: the first dozen alone lies a quarter of a nat from the whole file.
    sums, counts = zip(*(total_loss(story.strip()) for story in stories[:-1:20]), strict=True)
    assert abs(sum(sums) / sum(counts) - loss) < 0.15


def test_the_card_names_command_licence_and_source() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for fact in (
        "python examples/train_lfm2_tiny.py",
        "CDLA-Sharing-1.0",
        "TinyStories",
        "minutes",
    ):
        assert fact in card
