"""The options by which a user says how codes are chosen, for every command that quantizes."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from edgekit.commands._recipe_options import RecipeChoice
from edgekit.errors import EdgekitError, Interrupted

if TYPE_CHECKING:
    from edgekit.workflows.quality import Quality


@dataclass(frozen=True)
class QualityChoice:
    """What the user said of how codes are chosen, for a language model or a module."""

    calibrate: str | None = None
    method: str | None = None
    bits: float | None = None
    target_size: str | None = None

    def of_a_model(self, choice: RecipeChoice, codes: bool = False) -> "Quality":
        """Return what is asked for a language model; EdgekitError where it contradicts the rest."""
        from edgekit.quantize.methods import Method
        from edgekit.workflows.quality import Budget, Quality, check_exclusions

        size = None if self.target_size is None else _bytes(self.target_size)
        budget = None if (self.bits, size) == (None, None) else Budget(size, self.bits)
        text = None if self.calibrate is None else Path(self.calibrate)
        quality = Quality(text, cast("Method | None", self.method), budget)
        form = choice.llama_format
        check_exclusions(
            quality,
            choice.option if choice.given else None,
            form,
            codes,
        )
        return quality

    def refuse_budget(self) -> None:
        """Raise EdgekitError for what a module does not take."""
        for option, value in (("--bits", self.bits), ("--target-size", self.target_size)):
            if value is not None:
                raise EdgekitError(f"{option} is for language models: give a module a --recipe")


def quality_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --calibrate, --method, --bits and --target-size; pass them on as `chosen`."""

    @functools.wraps(function)
    def with_quality(**options: Any) -> Any:  # noqa: ANN401 - click's options are of any type
        names = [field.name for field in fields(QualityChoice)]
        return function(
            chosen=QualityChoice(**{name: options.pop(name) for name in names}), **options
        )

    for option in (
        click.option(
            "--target-size",
            metavar="SIZE",
            help="Mixed precision within these bytes of all tensors, such as 500MB.",
        ),
        click.option(
            "--bits",
            type=float,
            metavar="N",
            help="Mixed precision within these bits per weight, such as 5.5, embedding and scales "
            "included.",
        ),
        click.option(
            "--method",
            metavar="NAME",
            help="How codes are chosen: gptq, mse (below 8 bits) or rtn; codebooks (cb3, ...) by "
            "jlcm (a reconstruction of arXiv 2309.17361), weighted-kmeans or kmeans  [default: "
            "gptq or jlcm with --calibrate, else as the recipe says]. Of a module, how ranges are "
            "found: moving-average, percentile or mse  [default: moving-average]",
        ),
        click.option(
            "--calibrate",
            metavar="DATA",
            help="UTF-8 text like what the model will be used on, to choose the codes by. Of a "
            "module, inputs that show the ranges of its activations: a .npy, .npz or .safetensors "
            "file [N, ...], a folder of them, FILE.py:FUNCTION that yields mini-batches, or a "
            "saved calibration .json.",
        ),
    ):
        with_quality = option(with_quality)
    return with_quality


@contextmanager
def resumable(quality: "Quality") -> Iterator[None]:
    """Say at Ctrl-C that what was asked for goes on where it stopped, where that is so."""
    try:
        yield
    except KeyboardInterrupt:
        if not quality.given:
            raise
        raise Interrupted(
            "interrupted; what is done so far is kept: the same command goes on from there"
        ) from None


def _bytes(text: str) -> int:
    from edgekit.common.sizes import parse_size

    size = parse_size(text)
    if size is None:
        raise EdgekitError(f"--target-size {text!r:.40}: must be a size such as 500MB or 1.5GiB")
    return size
