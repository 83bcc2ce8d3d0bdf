"""The options by which a user chooses a recipe, for every command that quantizes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.commands._completion import schemes
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.quantize.recipe import Recipe
    from edgekit.quantize.traced.schemes import LayerRecipe


@dataclass(frozen=True)
class RecipeChoice:
    """What the user asked for: a preset, one scheme for all linears, a file, or nothing."""

    preset: str | None = None
    scheme: str | None = None
    file: Path | None = None

    @property
    def given(self) -> bool:
        """Whether the user asked for anything."""
        return self != RecipeChoice()

    @property
    def option(self) -> str:
        """The option by which the user asked for it."""
        if self.file is not None:
            return "--recipe"
        return "--scheme" if self.scheme is not None else f"--{self.preset}"

    @property
    def label(self) -> str:
        """A short name for files: the preset, the scheme or the stem of the recipe's file."""
        if self.llama_format is not None:
            return self.llama_format
        return self.preset or self.scheme or (self.file.stem if self.file else "int8")

    @property
    def llama_format(self) -> str | None:
        """Which of llama.cpp's own formats was asked for, if one was."""
        from edgekit.exporters.contract.own_formats import find_format

        return None if self.scheme is None else find_format(self.scheme)

    def recipe(self) -> "Recipe":
        """Return the recipe; int8 where nothing was asked for.

        EdgekitError for one of llama.cpp's own formats, which edgekit does not quantize to.
        """
        from edgekit.exporters.contract.own_formats import check_format
        from edgekit.quantize.recipe import Recipe

        if self.llama_format is not None:
            raise EdgekitError(
                f"--scheme {self.label} is one of llama.cpp's own formats: only "
                "`edgekit export --target gguf` makes it"
            )
        if self.file is not None:
            return Recipe.load(self.file)
        if self.scheme is not None:
            check_format(self.scheme)
        return Recipe.named(self.scheme or self.preset or "int8")

    def layer_recipe(self) -> "LayerRecipe":
        """Return the recipe of a module; w8a8 where int8 or nothing was asked for."""
        from edgekit.quantize.traced.schemes import LayerRecipe

        if self.file is not None:
            return LayerRecipe.load(self.file)
        if self.preset == "int4":
            raise EdgekitError("--int4 is for language models: give a module --scheme w4a8")
        return LayerRecipe.uniform(self.scheme or ("float" if self.preset == "float" else "w8a8"))


def recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --int8, --int4, --float, --scheme and --recipe; pass them on as `choice`.

    At most one may be given: EdgekitError names the two that exclude each other.
    """
    return _recipe_options(function, "", "")


def recipe_options_of_any(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `recipe_options` does where modules are taken too."""
    return _recipe_options(
        function,
        "; of a module w8a8",
        " Of a module: w8a8 or w4a8 (int8 codes in the file), each also with -affine, -tensor or "
        "-tensor-affine, or float.",
    )


def _recipe_options(
    function: Callable[..., Any], int8_of_a_module: str, scheme_of_a_module: str
) -> Callable[..., Any]:
    """Add the options; what they are for a module ends the help of two of them."""

    @functools.wraps(function)
    def with_choice(**options: Any) -> Any:  # noqa: ANN401 - click's options are of any type
        names = ("int8", "int4", "float_", "scheme", "recipe_file")
        return function(choice=_choice({name: options.pop(name) for name in names}), **options)

    for option in (
        click.option(
            "--recipe",
            "recipe_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="TOML or JSON rules: a regular expression to a scheme, first match wins.",
        ),
        click.option(
            "--scheme",
            metavar="SCHEME",
            shell_complete=schemes,
            help="w8, w8gN, w4, w4gN, w4gNa, w6g16, w5g32, float or a codebook (cb4, cb3, "
            "cb2, each also gN and xN, or cb4nl) for all linears; below 8 bits the embedding and "
            f"the head stay int8.{scheme_of_a_module}",
        ),
        click.option("--float", "float_", is_flag=True, help="Quantize nothing."),
        click.option("--int4", is_flag=True, help="int4 in groups of 32; embedding and head int8."),
        click.option(
            "--int8",
            is_flag=True,
            help=f"int8 per channel, all matrices{int8_of_a_module}  [default]",
        ),
    ):
        with_choice = option(with_choice)
    return with_choice


def _choice(options: dict[str, Any]) -> RecipeChoice:
    flags = {"float_": "--float", "recipe_file": "--recipe"}
    given = [name for name, value in options.items() if value is not None and value is not False]
    if len(given) > 1:
        first, second = (flags.get(name, f"--{name}") for name in given[:2])
        raise EdgekitError(f"{first} and {second} exclude each other: give one of them")
    if not given:
        return RecipeChoice()
    name = given[0]
    if name == "recipe_file":
        return RecipeChoice(file=options[name])
    if name == "scheme":
        return RecipeChoice(scheme=options[name])
    return RecipeChoice(preset=name.rstrip("_"))
