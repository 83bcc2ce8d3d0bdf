"""Tokenizer: exact against transformers, a stream that equals `decode`, sandboxed templates."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgekit.errors import EdgekitError
from edgekit.models.chat_template import ChatTemplate
from edgekit.models.tokenizer import BYTE_ALPHABET, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "Once upon a time there was a little dog. He said: “naïve café” — 你好, 🙂👩‍👩‍👧!\n\tThe end."
)

# Written for this test after the shape of LFM2's: a system part with tools, then ChatML.
TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(system="", seen=0) -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set ns.system = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system = ns.system + "\\nList of tools: " + (tools | tojson) -%}
{%- endif -%}
{%- if ns.system -%}
    {{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}
{%- endif -%}
{% for message in messages %}
    {% if message["role"] not in ["user", "assistant", "tool"] %}
        {{- raise_exception("unknown role " + message["role"]) }}
    {% endif %}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["content"] is not string -%}
        {{- message["content"] | tojson -}}
    {%- elif message["role"] == "assistant" -%}
        {% generation %}{{ message["content"] | trim }}{% endgeneration %}
    {%- else -%}
        {{- message["content"] -}}
    {%- endif -%}
    {{- "<|im_end|>" }}
    {% set ns.seen = ns.seen + 1 %}
    {% if ns.seen > 20 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" -}}
{% endif %}
"""


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small byte-level BPE in Hugging Face layout."""
    place = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_tokens(["<tool> é"])  # an added token that is not special
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 1)]
    )
    backend.save(str(place / "tokenizer.json"))
    write_json(
        place / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
            "pad_token": "<|pad|>",
            "add_bos_token": True,
        },
    )
    write_json(place / "config.json", {"bos_token_id": 1, "eos_token_id": 4})
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> "PreTrainedTokenizerFast":
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def copy(folder: Path, target: Path, **files: object) -> Path:
    """Copy a tokenizer folder; `name=content` replaces a JSON file, None removes it."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, content in files.items():
        file = target / f"{name}.json"
        if content is None:
            file.unlink()
        else:
            write_json(file, content)
    return target


@pytest.mark.parametrize("text", [TEXT, "", " ", "<|im_start|>user\nhi<|im_end|>", "<tool> é x"])
@pytest.mark.parametrize("add_special", [True, False])
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer, reference: "PreTrainedTokenizerFast", text: str, add_special: bool
) -> None:
    ids = tokenizer.encode(text, add_special)
    assert ids == reference.encode(text, add_special_tokens=add_special)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_plain_ids_leave_those_of_other_threads_alone(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>" * 50
    expected, plain = tokenizer.encode(text), tokenizer.encode_plain(text)
    assert len(plain) > len(expected)
    with ThreadPoolExecutor(2) as pool:
        ours = pool.submit(lambda: [tokenizer.encode_plain(text) for _ in range(500)])
        theirs = pool.submit(lambda: [tokenizer.encode(text) for _ in range(500)])
        assert all(ids == plain for ids in ours.result())
        assert all(ids == expected for ids in theirs.result())


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(TEXT)[0] == tokenizer.bos_id == 1
    assert tokenizer.eos_ids == (4,)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == 321


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 330), max_size=40))
def test_a_stream_equals_decode_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=12))
def test_a_stream_equals_decode_for_any_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    alphabet = {byte: char for char, byte in BYTE_ALPHABET.items()}
    ids = [tokenizer.backend.token_to_id(alphabet[byte]) or 0 for byte in data]
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids) == data.decode(errors="replace")


def test_a_stream_never_shows_part_of_a_character(tokenizer: Tokenizer) -> None:
    alphabet = {byte: char for char, byte in BYTE_ALPHABET.items()}
    ids = [tokenizer.backend.token_to_id(alphabet[byte]) or 0 for byte in "é🙂".encode()]
    stream = tokenizer.stream()
    assert [stream.push(token) for token in ids] == ["", "é", "", "", "", "🙂"]
    assert stream.flush() == ""


def test_a_stream_ends_a_broken_character_once(tokenizer: Tokenizer) -> None:
    alphabet = {byte: char for char, byte in BYTE_ALPHABET.items()}
    stream = tokenizer.stream()
    pushes = [stream.push(tokenizer.backend.token_to_id(alphabet[b]) or 0) for b in b"a\xf0\x9f"]
    assert pushes == ["a", "", ""]
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


def test_special_tokens_are_not_shown_but_added_ones_are(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a<tool> é<|im_end|>")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "a<tool> é"


MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hi <b>&amp;</b> 'you' 🙂\n"},
    {"role": "assistant", "content": "  Hello.  "},
    {"role": "tool", "content": {"z": [1, 2.5, None], "a": "é<"}},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("count", range(1, 6))
def test_prompts_are_those_of_transformers(
    tokenizer: Tokenizer, reference: "PreTrainedTokenizerFast", count: int
) -> None:
    messages = MESSAGES[:count]
    prompt = tokenizer.chat(messages)
    assert prompt == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer.encode(prompt, add_special=False).count(1) == 1  # bos once, not twice


def test_tools_and_options_reach_the_template(
    tokenizer: Tokenizer, reference: "PreTrainedTokenizerFast"
) -> None:
    assert tokenizer.template is not None
    tools = [{"name": "weather", "description": "é", "parameters": {"b": 1, "a": 2}}]
    prompt = tokenizer.template.render(
        MESSAGES[1:2], {**tokenizer.special_text, "tools": tools}, add_generation_prompt=False
    )
    assert prompt == reference.apply_chat_template(MESSAGES[1:2], tools=tools, tokenize=False)


def test_the_bundled_model_agrees_with_transformers() -> None:
    folder = Path(__file__).parents[2] / "edgekit" / "models" / "lfm2_tiny"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("lfm2-tiny is not there")
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.decode(ours.encode(TEXT)) == TEXT
    messages = [{"role": "user", "content": "Tell me a story."}]
    assert ours.chat(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"config": {"eos_token_id": [4, 2]}}, (4, 2)),
        ({"generation_config": {"eos_token_id": [2]}}, (2,)),
        ({"generation_config": {"eos_token_id": None}}, (4,)),
        ({"config": None}, (4,)),
        ({"config": None, "tokenizer_config": None}, ()),
    ],
)
def test_eos_comes_from_the_models_own_files(
    folder: Path, tmp_path: Path, files: dict[str, object], eos: tuple[int, ...]
) -> None:
    assert Tokenizer.load(copy(folder, tmp_path, **files)).eos_ids == eos


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": {}}, "is not a byte-level tokenizer"),
        ({"tokenizer": []}, "must hold a JSON object"),
        ({"tokenizer": None}, "cannot be read: No such file"),
        ({"tokenizer": {"decoder": {"type": "Metaspace"}}}, "is not a byte-level tokenizer"),
        ({"tokenizer": {"decoder": {"type": "ByteLevel"}}}, "not a usable tokenizer"),
        ({"config": {"eos_token_id": "4"}}, "eos_token_id must be a token id"),
        ({"config": {"eos_token_id": 4000}}, "eos_token_id 4000 is not in tokenizer.json"),
        ({"config": {"bos_token_id": 4000}}, "bos_token_id 4000 is not in tokenizer.json"),
        ({"config": [1]}, "must hold a JSON object"),
    ],
)
def test_broken_files_are_refused(
    folder: Path, tmp_path: Path, files: dict[str, object], message: str
) -> None:
    with pytest.raises(EdgekitError, match=message) as caught:
        Tokenizer.load(copy(folder, tmp_path, **files))
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damaged_tokenizer_loads_or_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray((folder / "tokenizer.json").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(1, 60))] = data.draw(st.binary(max_size=4))
    damaged = copy(folder, tmp_path_factory.mktemp("damaged"))
    (damaged / "tokenizer.json").write_bytes(content)
    try:
        Tokenizer.load(damaged).encode(TEXT)
    except EdgekitError as error:
        assert "\n" not in str(error)


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(EdgekitError, match="not valid UTF-8"):
        tokenizer.encode("a\udcff")


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path) -> None:
    copy(folder, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(EdgekitError, match="no chat template; give the text as it is"):
        Tokenizer.load(tmp_path).chat(MESSAGES)


@pytest.mark.parametrize(
    "found",
    [
        "{{ bos_token }}old",
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "old"}],
    ],
)
def test_a_template_may_lie_in_the_tokenizers_configuration(tmp_path: Path, found: object) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": found})
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([], {"bos_token": ""}) == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    newer = ChatTemplate.load(tmp_path)
    assert newer is not None
    assert newer.render([]) == "new"


@pytest.mark.parametrize(
    "found", ["old", [{"name": "rag", "template": "x"}, {"name": "default", "template": "old"}]]
)
def test_a_template_may_lie_where_processors_had_it(tmp_path: Path, found: object) -> None:
    """And the tokenizer's own goes before it, as in AutoTokenizer."""
    write_json(tmp_path / "chat_template.json", {"chat_template": found})
    for more in ({}, {"chat_template": None}):
        write_json(tmp_path / "tokenizer_config.json", more)
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        assert template.render([]) == "old"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "own"})
    own = ChatTemplate.load(tmp_path)
    assert own is not None
    assert own.render([]) == "own"


def test_further_templates_leave_the_default_alone(tmp_path: Path) -> None:
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("default")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render([]) == "default"


def test_a_templates_lines_may_end_as_they_like(tmp_path: Path) -> None:
    """And a byte order mark is no part of it."""
    text = "{% for m in messages %}\n<{{ m.content }}>\n{% endfor %}"
    for written in (text, text.replace("\n", "\r\n"), "\ufeff" + text):
        (tmp_path / "chat_template.jinja").write_bytes(written.encode())
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        assert template.render([{"content": "a"}]) == "<a>\n"
    (tmp_path / "chat_template.jinja").write_bytes(text.encode("utf-16"))
    with pytest.raises(EdgekitError, match="chat_template.jinja: is not UTF-8 but UTF-16"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("found", [7, [], [{"name": "rag", "template": "x"}], {"a": "b"}])
def test_a_template_of_another_type_is_refused(tmp_path: Path, found: object) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": found})
    with pytest.raises(EdgekitError, match="chat_template must be a text or a list"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("text", ["{% if %}", "{{", "{% for x in y %}", "{{ x | nothing }}"])
def test_a_template_that_does_not_compile_is_refused(text: str) -> None:
    with pytest.raises(EdgekitError, match="broken chat template") as caught:
        ChatTemplate(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no\nsystem') }}",
        "{{ messages[0].content.more.still }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ dict.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_a_template_cannot_fail_or_escape_but_in_one_line(text: str) -> None:
    with pytest.raises(EdgekitError, match="chat template: ") as caught:
        ChatTemplate(text).render(MESSAGES)
    assert "\n" not in str(caught.value)


def test_the_date_is_there_for_templates() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]).isdigit()
