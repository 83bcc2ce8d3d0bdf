"""What every target offers, what it is given, and how one is found by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved
from edgekit.quantize.scheme import FORMS
from edgekit.quantize.tensor import QuantizedTensor


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
                "--imatrix is for llama.cpp's own formats: give one with --scheme, such as Q4_K_M"
            )


@dataclass(frozen=True)
class Job:
    """One model to write.

    `rows` is the table as the file holds it (`stored_rows`) and `tied` the tensors that have
    another's values; `weights` gives each row's tensor; `context` the positions to make room for;
    `folder` holds the tokenizer's files, or is None for random weights.
    """

    id: str
    config: ModelConfig
    rows: Sequence[Resolved]
    tied: Mapping[str, str]
    weights: Weights
    context: int
    folder: Path | None
    options: Options = field(default_factory=Options)


class Target(Protocol):
    """A module of this package that writes one kind of file.

    `NAME` is the target's and its engine's, `ENGINE` what people call the engine, `OPTIONS` the
    fields of `Options` that the target understands, `BLOCK_KINDS` the blocks that it can write,
    `HELD_AS_SUCH` the schemes of codebooks, and of 5 and 6 bits, that the file holds as such, where
    others become int8 codes, `LONGEST_CHECK` the positions up to which verification runs prompts:
    fewer where the file holds no program whose lengths could be wrong.
    """

    NAME: str
    ENGINE: str
    OPTIONS: frozenset[str]
    BLOCK_KINDS: tuple[type, ...]
    HELD_AS_SUCH: frozenset[str]
    LONGEST_CHECK: int

    def check_config(self, config: ModelConfig, options: Options) -> None:
        """Refuse, before any work, forms of blocks and shapes that the engine does not run.

        The message names what runs them.
        """
        ...

    def check_rows(self, rows: Sequence[Resolved]) -> None:
        """Refuse, before any work, a scheme that the target cannot hold, naming what it can."""
        ...

    def stored_once(self, rows: Sequence[Resolved], tied: Mapping[str, str]) -> list[str]:
        """Return the tensors whose bytes the file holds under another's name."""
        ...

    def stored_bytes(self, row: Resolved) -> int:
        """Return the bytes that a tensor takes in the file, padding and names left out."""
        ...

    def fake_quantize(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        """Round the inputs `[n, columns]` of a linear as the engine does at run time."""
        ...

    def model_file(self, rows: Sequence[Resolved], options: Options) -> str:
        """Return the file that the engine opens, in the artifact's folder or one below it."""
        ...

    def requires(self, options: Options) -> dict[str, str]:
        """Return what must be there to run the file: versions of formats and of run times."""
        ...

    def write(self, job: Job, folder: Path, progress: Callable[[str], None]) -> None:
        """Write `model_file`, and what belongs to it, into the folder; weights verbatim.

        `config.json` is there already. `job.weights` may be cleared on the way.
        """
        ...

    def check_tokenizer(self, path: Path, folder: Path) -> dict[str, int]:
        """Compare the tokenizer inside a written file with that of the model's folder.

        Returns how many texts were compared, and how many tokens they have; nothing where the
        file holds no tokenizer. VerificationError names the first text whose ids differ. Called
        where the target's engine is installed.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions that decided the file's bytes."""
        ...


def find_target(name: str, options: Options) -> Target:
    """Return the target of that name; EdgekitError for another, and for options it has not."""
    target = cast(Target, TARGETS.load(name, "decoder"))
    for option, value in _given(options).items():
        if option not in target.OPTIONS:
            raise EdgekitError(_refusal(option, value, name))
    return target


def check_model(target: Target, config: ModelConfig, options: Options) -> None:
    """Refuse, before any work, a model with a block or a shape that a target cannot write."""
    for layer in config.architecture.layers:
        for _, block in layer.halves:
            if not isinstance(block, target.BLOCK_KINDS):
                raise EdgekitError(
                    f"{block.name}: target {target.NAME} cannot hold a block of the kind "
                    f"{type(block).__name__}"
                )
    target.check_config(config, options)


def _refusal(option: str, value: object, target: str) -> str:
    if option == "llama_format":
        return (
            f"--scheme {value} is one of llama.cpp's own formats, which target {target} cannot "
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
