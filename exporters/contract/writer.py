"""What writes a target's file, and what verification must know of its engine."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from edgekit.exporters.contract.layout import Options
from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.registry import TARGETS
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Table
from edgekit.quantize.tensor import QuantizedTensor


@dataclass(frozen=True)
class Job:
    """One model to write.

    `table` is as the file holds it (`stored`); `weights` gives each row's tensor; `context` the
    positions to make room for; `folder` holds the tokenizer's files, or is None for random weights.
    """

    id: str
    config: ModelConfig
    table: Table
    weights: Weights
    context: int
    folder: Path | None
    options: Options = field(default_factory=Options)


class Writer(Protocol):
    """A target's `decoder.py`: writes a language model.

    `MAX_CHECK_TOKENS` are the positions up to which verification runs prompts: fewer where the file
    holds no program whose lengths could be wrong.
    """

    MAX_CHECK_TOKENS: int

    def fake_quantize(self, x: Tensor, weight: QuantizedTensor) -> Tensor:
        """Round the inputs `[n, columns]` of a linear as the engine does at run time."""
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


def load_writer(name: str) -> Writer:
    """Return what writes for a target that `find_layout` knows."""
    return cast(Writer, TARGETS.load(name, "decoder"))
