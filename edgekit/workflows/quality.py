"""What a user may ask of quantization beyond a recipe: a text to calibrate on, a budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import EdgekitError
from edgekit.quantize.methods import METHODS, Method
from edgekit.quantize.schemes.codebook import Codebook

if TYPE_CHECKING:
    from edgekit.quantize.recipe import Recipe

CODEBOOK_METHODS: tuple[Method, ...] = ("kmeans", "weighted-kmeans", "jlcm")
WITH_TEXT: tuple[Method, ...] = ("gptq", "weighted-kmeans", "jlcm")
_MOST_BITS = 64
_TOO_MANY_BYTES = 1 << 60


@dataclass(frozen=True)
class Budget:
    """Bytes of all tensors, or bits for each of the model's parameters; exactly one of the two.

    EdgekitError for both, for neither, and for no positive number.
    """

    bytes: int | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no budget."""
        if self.bytes is not None and self.bits is not None:
            raise EdgekitError("`bits` and `target_size` exclude each other: give one of them")
        if self.bytes is None and not (
            isinstance(self.bits, int | float) and 0 < self.bits <= _MOST_BITS
        ):
            raise EdgekitError(
                f"`bits` {self.bits!s:.40}: must be a number of bits per weight, such as 5.5"
            )
        if self.bits is None and not (
            isinstance(self.bytes, int) and 1 <= self.bytes < _TOO_MANY_BYTES
        ):
            raise EdgekitError(
                f"`target_size` {self.bytes!r:.40}: must be a number of bytes, such as 500000000"
            )

    def of(self, parameters: int) -> int:
        """Return the bytes for a model of so many parameters."""
        return self.bytes if self.bytes is not None else int((self.bits or 0) * parameters / 8)

    @property
    def label(self) -> str:
        """A short name for recipes and files."""
        if self.bytes is None:
            return f"{self.bits:g}-bits"
        return f"{self.bytes / 1e6:g}MB" if self.bytes >= 1e5 else f"{self.bytes}B"

    @property
    def option(self) -> str:
        """The option and its value."""
        return f"`bits` {self.bits:g}" if self.bytes is None else f"`target_size` {self.label}"


@dataclass(frozen=True)
class Quality:
    """A text to calibrate on, a method and a budget for mixed precision; None: not asked for.

    Without a method GPTQ is used where there is a text, and the recipe's own ranges where not.
    """

    calibrate: Path | None = None
    method: Method | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Refuse a method that is none, and one that learns from a text without one."""
        if self.method is not None and self.method not in METHODS:
            raise EdgekitError(
                f"`method` {self.method!r:.40}: for language models there are {', '.join(METHODS)}"
            )
        if self.method in WITH_TEXT and self.calibrate is None:
            raise EdgekitError(f"`method` {self.method} needs a text: give one with `calibrate`")

    @property
    def given(self) -> bool:
        """Whether anything was asked for that needs codes of its own."""
        return self.calibrate is not None or self.budget is not None


def check_exclusions(
    quality: Quality,
    recipe: str | None = None,
    llama_format: str | None = None,
    codes: bool = False,
) -> None:
    """Raise EdgekitError for wishes that contradict each other.

    `recipe` is how the user gave one (`--int4`), `llama_format` the one of llama.cpp's own formats
    that it names; None where that is not so. `codes` says that a file of codes was given.
    """
    if codes and recipe is not None:
        raise EdgekitError(
            f"`codes` and {recipe} exclude each other: the file's tensors are what they are"
        )
    if codes and quality != Quality():
        raise EdgekitError("`codes` are chosen already: leave out how to choose them")
    if quality.budget is not None and recipe is not None:
        raise EdgekitError(
            f"{quality.budget.option} and {recipe} exclude each other: a budget chooses the schemes"
        )
    if llama_format is not None and quality != Quality():
        raise EdgekitError(
            f"`scheme` {llama_format} is llama.cpp's own format, which llama.cpp quantizes: it "
            "takes an `imatrix` only"
        )


def default_method(recipe: "Recipe") -> Method:
    """Return how codes are chosen on a text where nobody says it."""
    return "jlcm" if _has_codebooks(recipe) else "gptq"


def check_method(method: Method | None, recipe: "Recipe") -> None:
    """Refuse a method of codebooks for a recipe without, and another for one with them."""
    if method is None:
        return
    if method in CODEBOOK_METHODS and not _has_codebooks(recipe):
        raise EdgekitError(
            f"`method` {method} is for codebooks, of which {recipe.name} has none: give a scheme "
            "such as cb3"
        )
    if method not in CODEBOOK_METHODS and _has_codebooks(recipe):
        raise EdgekitError(
            f"`method` {method} is not for codebooks, which {recipe.name} has: give "
            f"{', '.join(CODEBOOK_METHODS)}"
        )


def _has_codebooks(recipe: "Recipe") -> bool:
    return any(isinstance(rule.scheme, Codebook) for rule in recipe.rules)
