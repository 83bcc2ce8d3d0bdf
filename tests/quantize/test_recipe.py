"""Recipes: presets, files, resolution, and every way in which a user can get one wrong."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.quantize.apply import quantize_tensors
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.recipe import (
    PRESETS,
    Recipe,
    Rule,
    Table,
    preset,
    resolve,
    uniform,
    warnings,
)
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.table import format_table, table_json
from edgekit.quantize.tensor import QuantizedTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEAR, OTHER = "model.layers.0.feed_forward.w1.weight", "model.layers.0.feed_forward.w2.weight"
CONV, NORM = "model.layers.0.conv.conv.weight", "model.layers.0.ffn_norm.weight"
SHAPES: dict[str, tuple[int, ...]] = {
    EMBEDDING: (100, 64),
    CONV: (64, 1, 3),
    NORM: (64,),
    LINEAR: (128, 64),
    OTHER: (64, 128),
}
TIED_SHAPES, TIED = {**SHAPES, HEAD: SHAPES[EMBEDDING]}, {HEAD: EMBEDDING}


def rule(pattern: str, scheme: str) -> Rule:
    return Rule(pattern, parse_scheme(scheme))


def schemes(recipe: Recipe) -> dict[str, str]:
    return {row.tensor: row.scheme.name for row in resolve(recipe, TIED_SHAPES)}


@pytest.mark.parametrize(
    ("recipe", "vocabulary", "linear"),
    [
        (preset("int8"), "w8", "w8"),
        (preset("int4"), "w8", "w4g32"),
        (preset("float"), "float", "float"),
        (uniform(parse_scheme("w8")), "w8", "w8"),
        (uniform(parse_scheme("w8g32")), "w8g32", "w8g32"),
        (uniform(parse_scheme("w4")), "w8", "w4"),
        (uniform(parse_scheme("w4g64")), "w8", "w4g64"),
        (uniform(FLOAT), "float", "float"),
    ],
)
def test_presets_and_uniform_schemes(recipe: Recipe, vocabulary: str, linear: str) -> None:
    expected = {EMBEDDING: vocabulary, HEAD: vocabulary, LINEAR: linear, OTHER: linear}
    assert schemes(recipe) == {**expected, CONV: "float", NORM: "float"}


def test_unknown_preset() -> None:
    with pytest.raises(EdgekitError, match="int8, int4, float"):
        preset("int3")


def test_rows_carry_range_shape_and_bytes() -> None:
    rows = {row.tensor: row for row in resolve(preset("int4"), TIED_SHAPES)}
    assert rows[LINEAR].range == "mse"
    assert rows[EMBEDDING].range == "minmax"
    assert rows[NORM].range is None
    assert rows[LINEAR].shape == (128, 64)
    assert rows[LINEAR].nbytes == 128 * 32 + 128 * 2 * 2
    assert rows[NORM].nbytes == 256
    assert rows[LINEAR].to_dict() == {
        "tensor": LINEAR,
        "scheme": "w4g32",
        "shape": [128, 64],
        "bytes": 4608,
    }


def test_the_first_matching_rule_wins_and_the_whole_name_counts() -> None:
    recipe = Recipe((rule(r".*w1\.weight", "w4g32"), rule(r"model\.layers.*", "w8")))
    assert schemes(recipe) == {
        EMBEDDING: "float",
        HEAD: "float",
        CONV: "float",
        NORM: "float",
        LINEAR: "w4g32",
        OTHER: "w8",
    }
    with pytest.raises(EdgekitError, match="matches no tensor"):
        resolve(Recipe((rule("w1", "w8"),)), SHAPES)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([(".*", "w8"), (".*w9.*", "w4")], "rule 2: pattern '.*w9.*' matches no tensor"),
        ([(".*norm.*", "w8"), (".*", "w8")], "rule 1: pattern '.*norm.*' matches only tensors tha"),
        ([(r".*conv\.conv.*", "w8")], f"matches only short convolutions, such as {CONV}, which s"),
        ([(r".*(norm|conv\.conv).*", "w8")], "matches only tensors that stay float, such as "),
        ([(".*", "w8"), (".*w1.*", "w4")], "rule 2: pattern '.*w1.*' is never reached"),
    ],
)
def test_rules_without_effect_are_errors(rules: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(EdgekitError) as refusal:
        resolve(Recipe(tuple(rule(*entry) for entry in rules), name="my.toml"), SHAPES)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("my.toml: rule ")


def test_a_float_rule_may_name_any_tensor() -> None:
    recipe = Recipe((rule(".*norm.*", "float"), rule(".*w1.*", "float"), rule(".*", "w8")))
    assert schemes(recipe)[LINEAR] == "float"


def test_a_group_that_does_not_divide_names_the_tensor() -> None:
    with pytest.raises(EdgekitError, match=rf"^{LINEAR}: w4g128 cannot hold it: group size 128"):
        resolve(uniform(parse_scheme("w4g128")), SHAPES)


def test_only_per_channel_int4_warns() -> None:
    for recipe in map(preset, PRESETS):
        assert warnings(resolve(recipe, SHAPES)) == []
    (warning,) = warnings(resolve(uniform(parse_scheme("w4")), SHAPES))
    assert "31.5" in warning
    assert "int4 (w4g32) is the safe one" in warning


def test_a_tied_head_of_another_scheme_warns_of_what_it_costs() -> None:
    shapes, tied = TIED_SHAPES, TIED
    for recipe in map(preset, PRESETS):
        assert warnings(resolve(recipe, shapes, tied)) == []
    rules = (Rule(re.escape(HEAD), parse_scheme("w4g32")), Rule(".*", parse_scheme("w8")))
    rows = resolve(Recipe(rules), shapes, tied)
    (warning,) = warnings(rows)
    (head,) = (row for row in rows if row.tensor == HEAD)
    assert f"{HEAD} (w4g32, mse) is tied to {EMBEDDING} (w8, minmax)" in warning
    assert f"takes {head.nbytes:,} bytes more" in warning
    assert rows.nbytes - resolve(preset("int8"), shapes, tied).nbytes == head.nbytes


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "r.toml", tmp_path / "r.json"
    toml.write_text(
        '[[rules]]\npattern = \'.*w1\\.weight\'\nscheme = "w4g32"\nrange = "minmax"\n'
        "[[rules]]\npattern = '.*'\nscheme = \"w8\"\n"
    )
    entries = [
        {"pattern": r".*w1\.weight", "scheme": "w4g32", "range": "minmax"},
        {"pattern": ".*", "scheme": "w8"},
    ]
    as_json.write_text(json.dumps({"rules": entries}))
    assert Recipe.load(toml).rules == Recipe.load(as_json).rules
    rows = {row.tensor: row for row in resolve(Recipe.load(toml), SHAPES)}
    assert (rows[LINEAR].scheme.name, rows[LINEAR].range) == ("w4g32", "minmax")


def load_error(path: Path) -> str:
    with pytest.raises(EdgekitError) as refusal:
        Recipe.load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"pattern": "(", "scheme": "w8"}], "rule 1: pattern '(' is no regular expression"),
        ([{"pattern": "a", "scheme": "w8"}, {"pattern": "a", "scheme": "w3"}], "rule 2: unknown s"),
        ([{"pattern": "a", "scheme": "w8", "range": "max"}], "rule 1: range must be minmax or mse"),
        ([{"pattern": "a", "scheme": "float", "range": "mse"}], "rule 1: range has no meaning"),
        ([{"pattern": "a", "scheme": "w8", "bits": 4}], "rule 1: unknown key 'bits'"),
        ([{"pattern": "a"}], "rule 1: scheme is missing"),
        ([{"scheme": "w8"}], "rule 1: pattern is missing"),
        ([{"pattern": 3, "scheme": "w8"}], "rule 1: pattern must be a string, got 3"),
        ([{"pattern": "a", "scheme": 8}], "rule 1: scheme must be a string, got 8"),
        ([{"pattern": "a", "scheme": "w8", "range": None}], "rule 1: range must be a string"),
        (["w8"], "rule 1: must be a table"),
        ([], "at least one rule"),
        ({"pattern": "a"}, "`rules` must be a list"),
    ],
)
def test_wrong_rules_are_named(tmp_path: Path, entries: object, message: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"rules": entries}))
    assert message in load_error(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.toml", b"[[rules]\n", "not valid TOML"),
        ("r.json", b"{", "not valid JSON"),
        ("r.json", b"[" * 100_000, "not valid JSON"),
        ("r.json", b"[]", "must hold a table"),
        ("r.json", b'{"rule": []}', "unknown key 'rule'"),
        ("r.toml", b"", "`rules` must be a list"),
        ("r.toml", b"x = '\xff'", "not UTF-8"),
        ("r.json", b"\xff\xfe", "not UTF-8"),
        ("r.yaml", b"rules: []", ".toml or a .json"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in load_error(tmp_path / name)


def test_absent_files_are_named(tmp_path: Path) -> None:
    assert "cannot be read" in load_error(tmp_path / "absent.toml")
    (tmp_path / "folder.toml").mkdir()
    assert "cannot be read" in load_error(tmp_path / "folder.toml")


class Weights:
    """Seeded weights that remember what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        generator = torch.Generator().manual_seed(list(SHAPES).index(name))
        return torch.randn(SHAPES[name], generator=generator).bfloat16()


def test_quantize_tensors_follows_the_table() -> None:
    get = Weights()
    rows = resolve(preset("int4"), TIED_SHAPES, TIED)
    result = dict(quantize_tensors(rows, get))
    assert list(result) == list(TIED_SHAPES)
    assert get.asked == list(SHAPES)  # the head's codes are the embedding's: nothing is read twice
    assert result[HEAD] is result[EMBEDDING]
    linear = result[LINEAR]
    assert isinstance(linear, QuantizedTensor)
    expected = quantize_weight(parse_scheme("w4g32"), Weights()(LINEAR), "mse")
    assert torch.equal(linear.codes, expected.codes)
    norm = result[NORM]
    assert isinstance(norm, torch.Tensor)
    assert norm.dtype == torch.bfloat16
    for row in rows:
        value = result[row.tensor]
        if isinstance(value, QuantizedTensor):
            assert value.nbytes == row.nbytes


def test_a_tied_head_may_have_its_own_scheme() -> None:
    recipe = Recipe((rule(HEAD.replace(".", r"\."), "w4g32"), rule(".*", "w8")))
    rows = resolve(recipe, TIED_SHAPES, TIED)
    assert rows.shared == {}
    get = Weights()
    result = dict(quantize_tensors(rows, get))
    head, embedding = result[HEAD], result[EMBEDDING]
    assert isinstance(head, QuantizedTensor)
    assert isinstance(embedding, QuantizedTensor)
    assert (head.bits, embedding.bits) == (4, 8)
    assert get.asked.count(EMBEDDING) == 2


def test_a_head_before_its_embedding_is_quantized_once() -> None:
    rows = Table(resolve(preset("int8"), TIED_SHAPES)[::-1], TIED)
    get = Weights()
    result = dict(quantize_tensors(rows, get))
    assert result[HEAD] is result[EMBEDDING]
    assert get.asked.count(EMBEDDING) == 1


def test_of_two_tied_tensors_only_the_alike_share_codes() -> None:
    shapes = {**TIED_SHAPES, "second.weight": SHAPES[EMBEDDING]}
    tied = {**TIED, "second.weight": EMBEDDING}
    rows = resolve(Recipe((rule("second.*", "w4g32"), rule(".*", "w8"))), shapes, tied)
    assert rows.shared == TIED
    result = dict(quantize_tensors(rows, Weights()))
    second = result["second.weight"]
    assert isinstance(second, QuantizedTensor)
    assert second.bits == 4
    assert result[HEAD] is result[EMBEDDING]


def test_faults_name_the_tensor() -> None:
    rows = resolve(preset("int8"), {LINEAR: (2, 4)})
    for weight, message in (
        (torch.full((2, 4), math.nan), "cannot be quantized to w8: the weight holds infinities"),
        (torch.ones(4, 2), r"expected shape \(2, 4\), got \(4, 2\)"),
        (torch.ones(2, 4, dtype=torch.int32), "must be float32"),
    ):
        with pytest.raises(EdgekitError, match=f"^{LINEAR}: .*{message}"):
            dict(quantize_tensors(rows, lambda _, weight=weight: weight))  # type: ignore[misc]


def test_the_table_counts_shared_codes_once() -> None:
    rows = resolve(preset("int8"), TIED_SHAPES, TIED)
    assert rows.nbytes == sum(row.nbytes for row in rows[:-1])
    assert Table(rows.rows).nbytes == sum(row.nbytes for row in rows)
    lines = format_table(rows).splitlines()
    assert len(lines) == 1 + len(rows) + 1
    assert lines[-2].split() == [HEAD, "w8", "minmax", "100x64", "shared"]
    assert lines[-1].startswith("6 tensors, ")
    entries = table_json(rows, {LINEAR: 40.123, OTHER: math.inf})
    by_name = {entry["tensor"]: entry for entry in entries}
    assert by_name[HEAD]["same_as"] == EMBEDDING
    assert by_name[LINEAR]["sqnr_db"] == 40.12
    assert by_name[OTHER]["sqnr_db"] is None
    json.dumps(entries, allow_nan=False)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "name_and_text",
    [
        ("r.toml", "[[rules]]\npattern = '.*'\nscheme = 'w8'\n"),
        ("r.json", '{"rules": [{"pattern": ".*",\n "scheme": "w8"}]}\n'),
    ],
)
def test_what_editors_of_other_systems_write(
    tmp_path: Path, name_and_text: tuple[str, str], mark: bytes, end: str
) -> None:
    name, text = name_and_text
    (tmp_path / name).write_bytes(mark + text.replace("\n", end).encode())
    assert Recipe.load(tmp_path / name).rules == uniform(parse_scheme("w8")).rules
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    assert load_error(tmp_path / name).endswith(
        "is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8"
    )
