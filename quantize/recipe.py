"""Recipes: ordered rules that give each weight a scheme, and the table they resolve to.

A recipe file is TOML or JSON with a list `rules`, here one TOML entry of it:

    [[rules]]
    pattern = '.*\\.feed_forward\\.w[123]\\.weight'   # a regular expression for the whole name
    scheme = "w4g32"
    range = "mse"                                    # optional: minmax or mse

The first rule that matches a tensor wins. Only matrices (two axes) are quantized: norms and the
short convolutions stay float whatever matches them, and so does what no rule matches. Short
convolutions are 3 weights a channel, less than a thousandth of a model: no engine runs codes there.
ggml's ssm_conv takes float32, integer convolutions of XNNPACK and ONNX Runtime take activations of
static ranges only.
"""

import json
import re
import tomllib
import warnings as python_warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from edgekit.common.files import decode_text, refuse_irregular
from edgekit.common.limits import TooCostly, bounded
from edgekit.errors import EdgekitError
from edgekit.quantize.methods import RANGE_METHODS, Method, RangeMethod
from edgekit.quantize.names import EMBEDDING, HEAD
from edgekit.quantize.schemes.affine import Affine
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.schemes.floats import FLOAT
from edgekit.quantize.schemes.names import Scheme, parse_scheme

PRESETS = ("int8", "int4", "float")
_W4_WARNING = (
    "w4 (int4, one scale per channel) ruins models of about 1B parameters: OPT-1.3B goes from "
    "perplexity 16.1 to 31.5 on C4, with groups of 32 to 17.0; int4 (w4g32) is the safe one"
)
_LONGEST_PATTERN = 1000
_SHORT_CONVOLUTION = ".conv.conv.weight"
_RuleType = TypeVar("_RuleType")
_VOCABULARY = rf"{re.escape(EMBEDDING)}|{re.escape(HEAD)}"


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` get `scheme`, its range found by `range`.

    `range` None means the scheme's own default. Raises EdgekitError for an invalid expression.
    """

    pattern: str
    scheme: Scheme
    range: RangeMethod | None = None

    def __post_init__(self) -> None:
        """Refuse expressions that do not compile and ranges that do not exist."""
        check_rule(self.pattern, self.range, self.scheme.is_float)
        if self.range is not None and isinstance(self.scheme, Codebook):
            raise EdgekitError(
                f"range has no meaning for the codebooks of {self.scheme.name}: leave it out"
            )

    def matches(self, tensor: str) -> bool:
        """Return whether the whole name matches."""
        return re.fullmatch(self.pattern, tensor) is not None


@dataclass(frozen=True)
class Resolved:
    """One row of the table: what a tensor is stored as.

    `range` is None for float tensors; `nbytes` is `Scheme.nbytes`.
    """

    tensor: str
    scheme: Scheme
    range: RangeMethod | None
    shape: tuple[int, ...]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the row as the manifest holds it."""
        return {
            "tensor": self.tensor,
            "scheme": self.scheme.name,
            "shape": list(self.shape),
            "bytes": self.nbytes,
        }


@dataclass(frozen=True)
class Table(Sequence[Resolved]):
    """What each tensor of a model is stored as: a row each, in the model's order.

    tied    by a tensor's name, the one whose values it has, as a tied head has the embedding's
    native  the schemes of codebooks, and of 5 and 6 bits, that the file holds natively, where
            others become int8 codes (`edgekit.exporters.contract.stored`); none without a file
    """

    rows: Sequence[Resolved]
    tied: Mapping[str, str] = field(default_factory=dict)
    native: frozenset[str] = frozenset()

    @overload
    def __getitem__(self, index: int) -> Resolved: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Resolved]: ...
    def __getitem__(self, index: int | slice) -> Resolved | Sequence[Resolved]:
        """Return a row, or some."""
        return self.rows[index]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @cached_property
    def shared(self) -> Mapping[str, str]:
        """The tied tensors whose codes are those of the tensor that they are tied to.

        Codes are shared where both rows have the same scheme and range; only one of the two then
        costs bytes.
        """
        table = {row.tensor: (row.scheme, row.range) for row in self.rows}
        return {
            tensor: source
            for tensor, source in self.tied.items()
            if tensor in table and source in table and table[tensor] == table[source]
        }

    @property
    def nbytes(self) -> int:
        """The bytes of all rows; codes that two names share count once."""
        return sum(row.nbytes for row in self.rows if row.tensor not in self.shared)


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; `name` is what messages call it (a file, a preset or a scheme)."""

    rules: tuple[Rule, ...]
    name: str = "recipe"

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """Return a preset's recipe, or that of one scheme for all linears."""
        return preset(name) if name in PRESETS else uniform(parse_scheme(name))

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a .toml or .json recipe; EdgekitError names the file and the rule at fault."""
        rules = load_rules(path, lambda *entry: Rule(entry[0], parse_scheme(entry[1]), entry[2]))
        return cls(rules, name=path.name)


def check_rule(pattern: str, range_method: str | None, is_float: bool) -> None:
    """Refuse expressions that do not compile and ranges that do not exist or mean nothing."""
    if len(pattern) > _LONGEST_PATTERN:
        raise EdgekitError(
            f"pattern {pattern[:40]!r}... has {len(pattern)} characters, "
            f"{_LONGEST_PATTERN} are allowed"
        )
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # of spellings that may change meaning
            re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise EdgekitError(f"pattern {pattern!r:.200} is no regular expression: {error}") from error
    if range_method is not None and range_method not in RANGE_METHODS:
        raise EdgekitError(f"range must be {' or '.join(RANGE_METHODS)}, got {range_method!r}")
    if range_method is not None and is_float:
        raise EdgekitError("range has no meaning for the scheme float: leave it out")


def load_rules(
    path: Path, make: Callable[[str, str, RangeMethod | None], _RuleType]
) -> tuple[_RuleType, ...]:
    """Read a .toml or .json recipe: `make(pattern, scheme, range)` gives each rule.

    EdgekitError names the file and the rule at fault.
    """
    rules = []
    for number, entry in enumerate(_entries(_parse(path), path), start=1):
        try:
            rules.append(make(*_rule(entry)))
        except EdgekitError as error:
            raise EdgekitError(f"{path}: rule {number}: {error}") from error
    return tuple(rules)


def preset(name: str) -> Recipe:
    """Return the recipe of a preset: int8, int4 or float.

    int8: every matrix int8 per channel, the embedding and the head included. int4: linears int4
    in groups of 32, range by least squared error; embedding and head int8 per channel.
    """
    schemes = {"int8": "w8", "int4": "w4g32", "float": "float"}
    if name not in schemes:
        raise EdgekitError(f"unknown preset {name!r}: allowed are {', '.join(PRESETS)}")
    return Recipe(uniform(parse_scheme(schemes[name])).rules, name=name)


def uniform(scheme: Scheme) -> Recipe:
    """Return the recipe that gives every linear layer one scheme.

    The embedding and the head take it too, except below 8 bits, where they stay int8 per channel:
    every token passes through both, and they cost more accuracy than they save bytes.
    """
    rules = [Rule(".*", scheme)]
    if scheme.bits is not None and scheme.bits < 8:
        rules.insert(0, Rule(_VOCABULARY, parse_scheme("w8")))
    return Recipe(tuple(rules), name=scheme.name)


def resolve(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str] | None = None,
) -> Table:
    """Return the table of tensors of these shapes, in their order; `tied` as in `Table`.

    Raises EdgekitError for a rule that takes no tensor, for a group size that does not divide
    a tensor's last axis, and where the patterns take seconds to match.
    """
    try:
        with bounded():
            return Table(_resolve(recipe, shapes), tied or {})
    except TooCostly as error:
        raise EdgekitError(
            f"{recipe.name}: matching its patterns {error}: simplify those with repeats in "
            "repeats, such as (a+)+"
        ) from error


def _resolve(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> list[Resolved]:
    used = set()
    rows = []
    for tensor, shape in shapes.items():
        number = _first_match(recipe, tensor, shape)
        if number is None:
            rows.append(_row(tensor, FLOAT, None, shape))
            continue
        used.add(number)
        rule = recipe.rules[number]
        rows.append(_row(tensor, rule.scheme, rule.range, shape))
    for number, rule in enumerate(recipe.rules):
        if number not in used:
            raise EdgekitError(f"{recipe.name}: {_why_unused(rule, number, shapes)}")
    return rows


def in_layers(tensor: str) -> bool:
    """Return whether a tensor is of a layer: no embedding, head or last norm."""
    return ".layers." in tensor


def method_of(rows: Sequence[Resolved]) -> Method:
    """Return the method of rows that are rounded to nearest (`edgekit.quantize.methods`)."""
    if any(isinstance(row.scheme, Codebook) for row in rows):
        return "kmeans"
    return "mse" if any(row.range == "mse" for row in rows) else "rtn"


def with_ranges(recipe: Recipe, method: Literal["rtn", "mse"]) -> Recipe:
    """Return the recipe with one way to find ranges: minimum and maximum, or least squared error.

    The latter below 8 bits; at 8 it gains next to nothing, so ranges there are what they were.
    """

    def changed(rule: Rule) -> Rule:
        scheme = rule.scheme
        if not isinstance(scheme, Affine) or (method == "mse" and scheme.bits == 8):
            return rule
        return replace(rule, range="mse" if method == "mse" else "minmax")

    return replace(recipe, rules=tuple(map(changed, recipe.rules)))


def warnings(table: Table) -> list[str]:
    """Return what a user should know about a table before waiting for it."""
    rows = {row.tensor: row for row in table}
    w4 = parse_scheme("w4")
    found = [_W4_WARNING] if any(row.scheme == w4 for row in table) else []
    for name, source in table.tied.items():
        if name in rows and source in rows and name not in table.shared:
            head, other = rows[name], rows[source]
            found.append(
                f"{name} ({_form(head)}) is tied to {source} ({_form(other)}) but stored on its "
                f"own, which takes {head.nbytes:,} bytes more: with one scheme and range for both "
                "the table is stored once"
            )
    return found


def _form(row: Resolved) -> str:
    return row.scheme.name if row.range is None else f"{row.scheme.name}, {row.range}"


def _first_match(recipe: Recipe, tensor: str, shape: tuple[int, ...]) -> int | None:
    for number, rule in enumerate(recipe.rules):
        if _applies(rule, shape) and rule.matches(tensor):
            return number
    return None


def _applies(rule: Rule, shape: tuple[int, ...]) -> bool:
    """Matrices take any scheme; norms and convolutions only float."""
    return len(shape) == 2 or rule.scheme.is_float


def _row(
    tensor: str, scheme: Scheme, method: RangeMethod | None, shape: tuple[int, ...]
) -> Resolved:
    try:
        scheme.check_shape(shape)
    except ValueError as error:
        raise EdgekitError(f"{tensor}: {scheme.name} cannot hold it: {error}") from error
    chosen = None if scheme.is_float else method or scheme.default_range
    return Resolved(tensor, scheme, chosen, tuple(shape), scheme.nbytes(shape))


def _why_unused(rule: Rule, number: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Say why rule `number` (from 0) took no tensor."""
    what = f"rule {number + 1}: pattern {rule.pattern!r} "
    matched = [tensor for tensor in shapes if rule.matches(tensor)]
    if not matched:
        example = next(iter(shapes), "none")
        return f"{what}matches no tensor of the model (a name is, for example, {example})"
    if all(tensor.endswith(_SHORT_CONVOLUTION) for tensor in matched):
        return (
            f"{what}matches only short convolutions, such as {matched[0]}, which stay float: "
            "integer ones take activations of static ranges, a language model's are found at run "
            "time; leave the rule out"
        )
    if all(len(shapes[tensor]) > 2 for tensor in matched):
        return (
            f"{what}matches only convolutions, such as {matched[0]}, which take static ranges: "
            "give example_inputs with a scheme such as w8a8"
        )
    if all(not _applies(rule, shapes[tensor]) for tensor in matched):
        return f"{what}matches only tensors that stay float, such as {matched[0]}"
    return f"{what}is never reached: earlier rules take every tensor it matches"


def _parse(path: Path) -> object:
    """Return the parsed file; EdgekitError where it is unreadable or malformed."""
    if path.suffix not in (".toml", ".json"):
        raise EdgekitError(f"{path}: a recipe is a .toml or a .json file")
    refuse_irregular(path)
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EdgekitError(f"{path}: {error}") from error
    try:
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        raise EdgekitError(f"{path}: not valid {kind}: {error}") from error


def _entries(document: object, path: Path) -> list[object]:
    """Return the list `rules` of a parsed recipe."""
    if not isinstance(document, dict):
        raise EdgekitError(f"{path}: must hold a table with the list `rules`")
    unknown = sorted(set(document) - {"rules"})
    if unknown:
        raise EdgekitError(f"{path}: unknown key {unknown[0]!r}: allowed is rules")
    entries = document.get("rules")
    if not isinstance(entries, list) or not entries:
        raise EdgekitError(f"{path}: `rules` must be a list of at least one rule")
    return entries


def _rule(entry: object) -> tuple[str, str, RangeMethod | None]:
    """Return pattern, scheme and range of one parsed entry."""
    if not isinstance(entry, dict):
        raise EdgekitError(f"must be a table with pattern and scheme, got {entry!r}")
    allowed = ("pattern", "scheme", "range")
    for key, value in entry.items():
        if key not in allowed:
            raise EdgekitError(f"unknown key {key!r}: allowed are {', '.join(allowed)}")
        if not isinstance(value, str):
            raise EdgekitError(f"{key} must be a string, got {value!r}")
    for key in ("pattern", "scheme"):
        if key not in entry:
            raise EdgekitError(f"{key} is missing")
    return entry["pattern"], entry["scheme"], entry.get("range")
