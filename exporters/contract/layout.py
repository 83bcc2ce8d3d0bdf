"""What a target can hold, told before any work and without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from edgekit.errors import EdgekitError
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.schemes.names import FORMS


@dataclass(frozen=True)
class Options:
    """Choices that only some targets have; a target refuses those that are not its own.

    llama_format  one of llama.cpp's own (`llama_formats.FORMATS`)
    imatrix       the file of an importance matrix for it
    abi           whose names and folder an ONNX model has
    portable      ONNX's own operators only
    """

    llama_format: str | None = None
    imatrix: Path | None = None
    abi: Literal["genai", "transformersjs"] = "genai"
    portable: bool = False

    def __post_init__(self) -> None:
        """Refuse choices that only others give a meaning."""
        if self.imatrix is not None and self.llama_format is None:
            raise EdgekitError(
                "`imatrix` is for llama.cpp's own formats: give one with `scheme`, such as Q4_K_M"
            )


class Layout(Protocol):
    """A target's `layout.py`: what its file can hold, and in how many bytes.

    `NAME` is the target's and its engine's, `ENGINE` what people call the engine, `OPTIONS` the
    fields of `Options` that the target understands, `BLOCK_KINDS` the blocks that it can write,
    `NATIVE_SCHEMES` those of codebooks, and of 5 and 6 bits, that the file holds natively, where
    others become int8 codes.
    """

    NAME: str
    ENGINE: str
    OPTIONS: frozenset[str]
    BLOCK_KINDS: tuple[type, ...]
    NATIVE_SCHEMES: frozenset[str]

    def check_config(self, config: ModelConfig, options: Options) -> None:
        """Refuse, before any work, forms of blocks and shapes that the engine does not run.

        The message names what runs them.
        """
        ...

    def check_rows(self, rows: Sequence[Resolved]) -> None:
        """Refuse, before any work, a scheme that the target cannot hold, naming what it can."""
        ...

    def stored_once(self, table: Table) -> list[str]:
        """Return the tensors whose bytes the file holds under another's name."""
        ...

    def stored_bytes(self, row: Resolved) -> int:
        """Return the bytes that a tensor takes in the file, padding and names left out."""
        ...

    def model_file(self, rows: Sequence[Resolved], options: Options) -> str:
        """Return the file that the engine opens, in the artifact's folder or one below it."""
        ...

    def requires(self, options: Options) -> dict[str, str]:
        """Return what must be there to run the file: versions of formats and of runtimes."""
        ...


def find_layout(name: str, options: Options) -> Layout:
    """Return the target of that name; EdgekitError for another, and for options it has not."""
    layout = cast(Layout, TARGETS.load(name, "layout"))
    for option, value in _given(options).items():
        if option not in layout.OPTIONS:
            raise EdgekitError(_refusal(option, value, name))
    return layout


def check_model(layout: Layout, config: ModelConfig, options: Options) -> None:
    """Refuse, before any work, a model with a block or a shape that a target cannot write."""
    for layer in config.architecture.layers:
        for _, block in layer.halves:
            if not isinstance(block, layout.BLOCK_KINDS):
                raise EdgekitError(
                    f"{block.name}: target {layout.NAME} cannot hold a block of the kind "
                    f"{type(block).__name__}"
                )
    layout.check_config(config, options)


def _refusal(option: str, value: object, target: str) -> str:
    if option == "llama_format":
        return (
            f"`scheme` {value} is one of llama.cpp's own formats, which target {target} cannot "
            f"hold, only gguf; schemes are {FORMS}"
        )
    return f"--{option} has no meaning for target {target}: leave it out"


def _given(options: Options) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {
        item.name: getattr(options, item.name)
        for item in fields(options)
        if getattr(options, item.name) != item.default
    }
