"""Generation and chat: a torch module that says a given text, a real byte-level tokenizer."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from edgekit.errors import EdgekitError
from edgekit.models.tokenizer import Tokenizer
from edgekit.runtime.engines.torch.decoder import TorchEngine
from edgekit.runtime.generation.chat import COMMANDS, Chat, converse, prompt_ids
from edgekit.runtime.generation.generate import Generation, GenerationResult, StopScanner, generate
from edgekit.runtime.generation.sampling import SamplingParams

SPECIAL = ["<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 3
VOCAB = len(SPECIAL) + 256
CONTEXT = 300
GREEDY = SamplingParams(temperature=0, repeat_penalty=1)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte is a token, so any character of several bytes is a split one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[EOS]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.load(folder)


class Follower(nn.Module):
    """After any token, the most probable next one is `successor(tokens so far)`."""

    def __init__(self, successor: Callable[[list[int]], int]) -> None:
        super().__init__()
        self.successor = successor
        self.register_buffer("seen", torch.zeros(CONTEXT, dtype=torch.int64))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        assert isinstance(self.seen, Tensor)
        start, end = int(input_pos), int(input_pos) + tokens.shape[1]
        self.seen[start:end] = tokens[0]
        logits = torch.zeros(1, VOCAB)
        logits[0, self.successor(self.seen[:end].tolist())] = 10
        return logits


def follower(successor: Callable[[list[int]], int]) -> TorchEngine:
    return TorchEngine(Follower(successor), CONTEXT, VOCAB, threads=1)


def reciter(tokenizer: Tokenizer, text: str, after: int) -> TorchEngine:
    """An engine that recites a text behind a prompt of `after` tokens, then ends."""
    script = tokenizer.encode(text)
    return follower(lambda seen: [*script, *[EOS] * CONTEXT][len(seen) - after])


def recite(
    tokenizer: Tokenizer,
    text: str,
    max_tokens: int | None = None,
    stops: tuple[str, ...] = (),
    params: SamplingParams = GREEDY,
) -> tuple[list[str], GenerationResult]:
    prompt = tokenizer.encode("Say:")
    engine = reciter(tokenizer, text, len(prompt))
    generation = generate(engine, tokenizer, prompt, params, max_tokens, stops, [EOS])
    pieces = list(generation)
    return pieces, generation.result()


def test_text_of_any_script_arrives_whole(tokenizer: Tokenizer) -> None:
    text = "Zürich, 東京 and 🙂👩‍👩‍👧 in one line"
    pieces, result = recite(tokenizer, text)
    assert "".join(pieces) == text == result.text
    assert all(pieces), "empty pieces are not worth a write"
    assert "東" in pieces, "a character arrives with its last byte"
    assert result.reason == "eos"


def test_an_unfinished_character_ends_as_a_replacement(tokenizer: Tokenizer) -> None:
    pieces, result = recite(tokenizer, "ab🙂", max_tokens=4)
    assert pieces == ["a", "b", "�"]
    assert (result.text, result.reason) == ("ab�", "length")


@pytest.mark.parametrize(
    ("stops", "text", "reason"),
    [
        (("END",), "one EN two ", "stop"),
        (("never", "END"), "one EN two ", "stop"),
        (("two END", "END"), "one EN ", "stop"),
        (("EN", "END"), "one ", "stop"),
        (("END of nothing",), "one EN two END of it", "eos"),
        (("it",), "one EN two END of ", "stop"),
        (("of it!",), "one EN two END of it", "eos"),
    ],
)
def test_stop_strings_over_many_tokens_are_never_shown(
    tokenizer: Tokenizer, stops: tuple[str, ...], text: str, reason: str
) -> None:
    pieces, result = recite(tokenizer, "one EN two END of it", stops=stops)
    assert ("".join(pieces), result.text, result.reason) == (text, text, reason)


def test_text_held_for_a_stop_string_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    pieces, _ = recite(tokenizer, "a EN b", stops=("END",))
    assert pieces == ["a", " ", "EN ", "b"]


def test_a_stop_string_that_the_replacement_completes(tokenizer: Tokenizer) -> None:
    _, result = recite(tokenizer, "a🙂", max_tokens=2, stops=("�",))
    assert (result.text, result.reason) == ("a", "stop")


def test_counts_and_times(tokenizer: Tokenizer) -> None:
    _, result = recite(tokenizer, "12345678", max_tokens=5)
    assert (result.prompt_tokens, result.cached_tokens) == (4, 0)
    assert (result.generated_tokens, result.decode_steps) == (5, 4)
    assert result.reason == "length"
    assert result.ttft_ns > 0
    assert result.decode_rate == result.decode_steps * 1e9 / result.decode_ns
    assert result.prefill_rate == 4e9 / result.ttft_ns
    assert set(result.to_dict()) >= {"text", "reason", "seed", "decode_tokens_per_second"}


def test_a_model_that_ends_at_once(tokenizer: Tokenizer) -> None:
    pieces, result = recite(tokenizer, "")
    assert (pieces, result.generated_tokens, result.reason) == ([], 0, "eos")
    assert result.decode_rate is None
    assert "0 tokens at - tok/s; ended by the model" in result.summary()


def test_the_context_ends_the_text(tokenizer: Tokenizer) -> None:
    engine = follower(lambda seen: 4 + len(seen) % 26)
    prompt = [5] * (CONTEXT - 3)
    generation = generate(engine, tokenizer, prompt, GREEDY)
    assert len("".join(generation)) > 0
    assert generation.result().reason == "context"
    assert (generation.result().generated_tokens, engine.position) == (4, CONTEXT)


def test_a_prompt_that_fills_the_context_yields_one_token(tokenizer: Tokenizer) -> None:
    engine = follower(lambda seen: 40)
    generation = generate(engine, tokenizer, [5] * CONTEXT, GREEDY)
    assert len(list(generation)) == 1
    assert generation.result().reason == "context"


def test_what_cannot_start_is_refused(tokenizer: Tokenizer) -> None:
    engine = follower(lambda seen: 4)
    with pytest.raises(EdgekitError, match="^prompt of 301 tokens does not fit the context of 300"):
        generate(engine, tokenizer, [5] * 301, GREEDY)
    with pytest.raises(EdgekitError, match="holds no token"):
        generate(engine, tokenizer, [], GREEDY)
    with pytest.raises(EdgekitError, match="max-tokens must be at least 1, not 0"):
        generate(engine, tokenizer, [5], GREEDY, max_tokens=0)
    with pytest.raises(EdgekitError, match="stop string must not be empty"):
        generate(engine, tokenizer, [5], GREEDY, stop_strings=["x", ""])
    engine.prefill([5, 6])
    with pytest.raises(EdgekitError, match="engine holds 2 tokens, so a prompt of 2 cannot"):
        generate(engine, tokenizer, [5, 6], GREEDY)


def test_the_seed_makes_text_reproducible(tokenizer: Tokenizer) -> None:
    hot = SamplingParams(temperature=5, min_p=0, seed=11)
    first, again = (recite(tokenizer, "x" * 40, 30, params=hot)[1] for _ in range(2))
    assert first.text == again.text != "x" * 30
    assert first.seed == 11
    other = recite(tokenizer, "x" * 40, 30, params=SamplingParams(5, min_p=0, seed=12))[1]
    assert other.text != first.text


@given(
    text=st.text(alphabet="abc", max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12)),
)
def test_stop_scanner_ignores_how_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    def scan(pieces: list[str]) -> tuple[str, bool]:
        scanner = StopScanner(stops)
        shown = ""
        for piece in pieces:
            shown += scanner.push(piece)
            if scanner.found:
                return shown, True
        return shown + scanner.flush(), False

    borders = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    shown, found = scan([text[a:b] for a, b in pairwise(borders)])
    assert (shown, found) == scan(list(text)) == scan([text])
    assert found == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert found or shown == text


# Chat


def answering(tokenizer: Tokenizer, answers: dict[str, str]) -> TorchEngine:
    """An engine that answers the last question of a ChatML prompt."""
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special=False)

    def successor(seen: list[int]) -> int:
        starts = range(len(seen) - len(opening), 0, -1)
        start = next(i for i in starts if seen[i : i + len(opening)] == opening)
        asked = tokenizer.backend.decode(seen[:start], skip_special_tokens=False)
        question = asked.rpartition("<|im_start|>user\n")[2].removesuffix("<|im_end|>\n")
        script = [*tokenizer.encode(answers[question]), EOS]
        return script[len(seen) - start - len(opening)]

    return follower(successor)


class Terminal:
    """What a user types (an exception is what a key press raises) and what is shown."""

    def __init__(self, *typed: str | BaseException) -> None:
        self._typed = iter(typed)
        self.text = ""
        self.notes: list[str] = []

    def read(self) -> str:
        line = next(self._typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text: str) -> None:
        self.text += text

    def hold(self, chat: Chat) -> None:
        converse(chat, self.read, self.write, self.notes.append)


def make_chat(tokenizer: Tokenizer, answers: dict[str, str], max_tokens: int | None = None) -> Chat:
    engine = answering(tokenizer, answers)
    return Chat(engine, tokenizer, GREEDY, [EOS], "Be brief.", max_tokens)


def test_turns_build_on_each_other_and_reuse_the_state(tokenizer: Tokenizer) -> None:
    chat = make_chat(tokenizer, {"Who?": "Ann.", "And you?": "Bob."})
    first = chat.ask("Who?")
    assert "".join(first) == "Ann."
    assert chat.keep(first).cached_tokens == 0
    held = chat.engine.position
    second = chat.ask("And you?")
    assert "".join(second) == "Bob."
    assert chat.keep(second).cached_tokens == held > 0
    assert [message["role"] for message in chat.messages] == [
        *("system", "user", "assistant", "user", "assistant"),
    ]


def test_reused_state_is_the_state_of_the_whole_prompt(tokenizer: Tokenizer) -> None:
    chat = make_chat(tokenizer, {"Who?": "Ann.", "And you?": "Bob."})
    for question in ("Who?", "And you?"):
        answer = chat.ask(question)
        list(answer)
        chat.keep(answer)
    module = chat.engine._module  # type: ignore[attr-defined]
    whole = prompt_ids(tokenizer, chat.messages[:-1], chat.engine.context) + tokenizer.encode(
        "Bob."
    )
    assert module.seen[: chat.engine.position].tolist() == whole[: chat.engine.position]


def test_an_answer_that_encodes_otherwise_starts_the_engine_anew(tokenizer: Tokenizer) -> None:
    chat = make_chat(tokenizer, {"A?": "🙂", "B?": "ok"}, max_tokens=3)
    first = chat.ask("A?")
    assert "".join(first) == "�", "three of four bytes, whose replacement has other bytes"
    chat.keep(first)
    second = chat.ask("B?")
    list(second)
    result = chat.keep(second)
    assert (result.text, result.cached_tokens) == ("ok", 0)


def test_an_answer_that_was_not_kept_leaves_no_trace(tokenizer: Tokenizer) -> None:
    chat = make_chat(tokenizer, {"Who?": "Ann.", "And you?": "Bob."})
    assert next(iter(chat.ask("Who?"))) == "A"
    other = chat.ask("And you?")
    assert "".join(other) == "Bob."
    assert chat.keep(other).cached_tokens == 0
    assert [message["content"] for message in chat.messages] == ["Be brief.", "And you?", "Bob."]


def test_chat_in_a_terminal(tokenizer: Tokenizer) -> None:
    terminal = Terminal("Who?", "  ", "/help", "/reset", "And you?", "/exit", "never read")
    chat = make_chat(tokenizer, {"Who?": "Ann.", "And you?": "Bob."})
    terminal.hold(chat)
    assert terminal.text == "Ann.\nBob.\n"
    assert "new conversation" in terminal.notes
    assert terminal.notes.count(COMMANDS) == 2, "at the start and for /help"
    assert [message["content"] for message in chat.messages] == ["Be brief.", "And you?", "Bob."]


def test_end_of_input_ends_the_chat(tokenizer: Tokenizer) -> None:
    terminal = Terminal(KeyboardInterrupt())
    terminal.hold(make_chat(tokenizer, {}))
    assert terminal.text == ""
    assert terminal.notes == [COMMANDS, "Ctrl-D or /exit ends the chat"]


def test_input_that_is_not_utf8_is_not_the_end(tokenizer: Tokenizer) -> None:
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    terminal = Terminal(broken, "Who?")
    terminal.hold(make_chat(tokenizer, {"Who?": "Ann."}))
    assert terminal.text == "Ann.\n"
    assert terminal.notes[1] == "the input is not UTF-8: invalid start byte at byte 0"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(tokenizer: Tokenizer) -> None:
    class Interrupted(Terminal):
        def write(self, text: str) -> None:
            super().write(text)
            if self.text == "An":
                raise KeyboardInterrupt

    terminal = Interrupted("Who?", "And you?")
    chat = make_chat(tokenizer, {"Who?": "Ann.", "And you?": "Bob."})
    terminal.hold(chat)
    assert terminal.text == "An\nBob.\n"
    assert chat.messages[2]["content"] == "An"
    assert "interrupted" in terminal.notes[1]


def test_a_question_that_does_not_fit_leaves_no_trace(tokenizer: Tokenizer) -> None:
    terminal = Terminal("x" * CONTEXT, "Who?")
    chat = make_chat(tokenizer, {"Who?": "Ann."})
    terminal.hold(chat)
    assert terminal.notes[1].endswith("does not fit the context of 300")
    assert terminal.text == "Ann.\n"
    assert len(chat.messages) == 3


def test_a_full_context_does_not_end_the_chat(tokenizer: Tokenizer) -> None:
    terminal = Terminal("Go", "Who?")
    chat = make_chat(tokenizer, {"Go": "y" * CONTEXT, "Who?": "Ann."})
    terminal.hold(chat)
    assert terminal.text.startswith("yyyy")
    assert terminal.text.endswith("y\nAnn.\n")
    assert "ended because the context is full" in terminal.notes[1]
    assert terminal.notes[2].startswith("the chat goes on: the oldest turns will be forgotten")
    assert terminal.notes[3] == "to fit the context of 300, the oldest turn is forgotten"
    assert [message["content"] for message in chat.messages] == ["Be brief.", "Who?", "Ann."]


def test_the_oldest_turns_make_room_for_an_answer(tokenizer: Tokenizer) -> None:
    """A turn is 84 of 300 tokens here; an answer gets at least a quarter of them."""
    answers = {f"{name}?": f"{name}{'.' * 60}" for name in "ABCDEF"}
    terminal = Terminal(*answers)
    chat = make_chat(tokenizer, answers)
    terminal.hold(chat)
    assert terminal.text == "".join(f"{answer}\n" for answer in answers.values())
    assert not any("full" in note for note in terminal.notes)
    assert sum("the oldest turn is forgotten" in note for note in terminal.notes) >= 3
    contents = [message["content"] for message in chat.messages]
    assert contents[0] == "Be brief."
    assert contents[-2:] == ["F?", answers["F?"]]
    assert "A?" not in contents


def test_no_more_turns_go_than_an_answer_needs(tokenizer: Tokenizer) -> None:
    answers = {f"{name}?": name for name in "ABCDEFGHIJKLMN"}
    short, long = make_chat(tokenizer, answers, max_tokens=4), make_chat(tokenizer, answers)
    for chat in (short, long):
        Terminal(*answers).hold(chat)
    assert len(short.messages) > len(long.messages)
    ids = prompt_ids(tokenizer, short.messages[:-1], CONTEXT)
    assert CONTEXT - 60 < len(ids) <= CONTEXT - 4


def test_turns_that_went_come_back_where_the_answer_is_not_kept(tokenizer: Tokenizer) -> None:
    chat = make_chat(tokenizer, {"Go": "y" * CONTEXT, "Who?": "Ann."})
    full = chat.ask("Go")
    list(full)
    chat.keep(full)
    before = list(chat.messages)
    assert chat.forgotten == 0
    chat.ask("Who?")
    assert (chat.forgotten, chat.messages) == (1, before)


def test_a_generation_that_was_not_run_is_an_interrupted_one(tokenizer: Tokenizer) -> None:
    generation: Generation = generate(follower(lambda seen: 4), tokenizer, [5], GREEDY)
    pieces: Iterator[str] = iter(generation)
    assert next(pieces)
    assert generation.result().reason == "interrupted"
    assert generation.processed == [5]


def test_saved_template_is_the_one_used(tokenizer: Tokenizer) -> None:
    ids = prompt_ids(tokenizer, [{"role": "user", "content": "a"}], 64)
    assert ids[:2] == [1, 2], "one bos, which the template brings"
