"""What a user may ask of quantization beyond a recipe: a text to calibrate on, a budget."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edgekit.errors import EdgekitError

Method = Literal["rtn", "mse", "gptq"]
"""How codes are chosen: rounded to nearest with ranges of minimum and maximum, with ranges of least
squared error, or by GPTQ on a text."""

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Budget:
    """Bytes of all tensors, or bits for each of the model's parameters; exactly one of the two."""

    bytes: int | None = None
    bits: float | None = None

    def of(self, parameters: int) -> int:
        """Return the bytes for a model of so many parameters."""
        return self.bytes if self.bytes is not None else int((self.bits or 0) * parameters / 8)

    @property
    def label(self) -> str:
        """A short name for recipes and files."""
        return f"{self.bits:g}-bits" if self.bytes is None else f"{self.bytes / 1e6:g}MB"

    @property
    def option(self) -> str:
        """The option and its value."""
        return f"--bits {self.bits:g}" if self.bytes is None else f"--target-size {self.label}"


@dataclass(frozen=True)
class Quality:
    """A text to calibrate on, a method and a budget for mixed precision; None: not asked for.

    Without a method GPTQ is used where there is a text, and the recipe's own ranges where not.
    """

    calibrate: Path | None = None
    method: Method | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Refuse GPTQ without a text."""
        if self.method == "gptq" and self.calibrate is None:
            raise EdgekitError("--method gptq needs a text: give one with --calibrate")

    @property
    def given(self) -> bool:
        """Whether anything was asked for that needs codes of its own."""
        return self.calibrate is not None or self.budget is not None
