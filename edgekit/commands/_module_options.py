"""The options by which a user describes a module, for the commands that quantize one."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.commands._quality_options import QualityChoice
    from edgekit.commands._recipe_options import RecipeChoice
    from edgekit.networks.user_code import Factory
    from edgekit.quantize.traced.placement import Placement
    from edgekit.workflows.export_network import Data


@dataclass(frozen=True)
class ModuleChoice:
    """What the user said of a module's inputs and weights."""

    example_shape: tuple[str, ...] = ()
    example_dtype: tuple[str, ...] = ()
    max_batch: int | None = None
    weights: Path | None = None

    def refuse_for_a_model(self) -> None:
        """Raise EdgekitError where the user gave any of it for a language model."""
        for field in fields(self):
            if getattr(self, field.name) not in (None, ()):
                name = field.name.replace("_", "-")
                raise EdgekitError(f"--{name} is for modules: name one as path/to/file.py:function")

    def place(
        self, factory: "Factory", choice: "RecipeChoice", codes: Path | None = None
    ) -> "tuple[str, Placement]":
        """Make the module, trace it, apply the recipe or the codes; return its name with that."""
        from edgekit.networks.source import example_inputs, make_module
        from edgekit.workflows.export_network import place_module

        recipe = choice.layer_recipe()
        example = example_inputs(self.example_shape, self.example_dtype)
        module = make_module(factory, self.weights)
        placement = place_module(module, example, recipe, self.max_batch, codes=codes)
        return type(module).__name__, placement


def refuse_for_a_module(**given: object) -> None:
    """Raise EdgekitError where the user gave any of a language model's options for a module."""
    for name, value in given.items():
        if value is not None and value is not False:
            option = name.replace("_", "-")
            raise EdgekitError(f"--{option} is for language models, not for a module")


def calibration_data(chosen: "QualityChoice", placement: "Placement") -> "Data":
    """Return the calibration data; EdgekitError where some are needed and none are named."""
    from edgekit.networks.data import open_data

    if chosen.calibrate is not None:
        if chosen.method is not None and chosen.calibrate.endswith(".json"):
            raise EdgekitError(f"--method means nothing to {chosen.calibrate}, which has ranges")
        return open_data(chosen.calibrate, placement.traced)
    if placement.edges:
        raise EdgekitError(
            "quantized activations need --calibrate: a .npy, .npz or .safetensors file of "
            "inputs, a folder of them, path/to/data.py:function, or a saved calibration .json"
        )
    return None


def module_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --example-shape and its kin; pass them on as `module`."""

    @functools.wraps(function)
    def with_module(**options: Any) -> Any:  # noqa: ANN401 - click's options are of any type
        names = [field.name for field in fields(ModuleChoice)]
        return function(
            module=ModuleChoice(**{name: options.pop(name) for name in names}), **options
        )

    for option in (
        click.option(
            "--weights",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="State dict of a module, safetensors  [default: what the function gives it]",
        ),
        click.option(
            "--max-batch",
            type=click.IntRange(2, 1 << 20),
            metavar="N",
            help="Let a module's batch vary up to N  [default: the example's only]",
        ),
        click.option(
            "--example-dtype",
            multiple=True,
            metavar="DTYPE",
            help="float32, int64, int32, uint8 or bool, one for each shape  [default: float32]",
        ),
        click.option(
            "--example-shape",
            multiple=True,
            metavar="SHAPE",
            help="Shape of a module's input, batch first: 1x3x32x32; repeat for further inputs. "
            "With its type and argument's name: mask=1x16:bool.",
        ),
    ):
        with_module = option(with_module)
    return with_module
