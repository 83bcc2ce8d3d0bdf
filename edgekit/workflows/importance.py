"""What a model's linears see on a text: the importance matrix that `llama-imatrix` computes.

Its conventions (tools/imatrix/imatrix.cpp): the text is tokenized as a whole, special tokens'
spellings as plain text and less one final newline, and cut into chunks whose remainder is dropped;
each chunk starts from a fresh state, its first token replaced by bos where the model adds one;
squares are summed over every position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekit.common.files import check_output_file, read_text
from edgekit.common.plural import counted
from edgekit.common.progress import Steps
from edgekit.errors import EdgekitError
from edgekit.exporters.gguf.llama.imatrix import Imatrix, Statistics
from edgekit.exporters.gguf.names import gguf_names
from edgekit.models.architecture import Linear
from edgekit.models.config import ModelConfig
from edgekit.models.decoder import Decoder
from edgekit.models.eager import EagerBlocks, float_reader
from edgekit.models.source import ModelSource, resolve_model
from edgekit.models.tokenizer import Tokenizer
from edgekit.models.weights import ReadWeight
from edgekit.runtime.evaluation.evaluate import cut, tokenize

LEAST_CONTEXT = 2
"""With one token a chunk is bos alone, and the text has no part in it."""


@dataclass(frozen=True)
class WrittenImatrix:
    """A file with an importance matrix, and of which model and text it is."""

    path: Path
    model_id: str
    revision: str | None
    text: str
    imatrix: Imatrix

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON takes."""
        return {
            "file": str(self.path),
            "model": {"id": self.model_id, "revision": self.revision},
            "text": self.text,
            "matrices": len(self.imatrix.entries),
            "chunks": self.imatrix.chunk_count,
            "context": self.imatrix.chunk_size,
        }

    def sentence(self) -> str:
        """Return it as a sentence."""
        found = self.imatrix
        return (
            f"wrote {self.path}: {counted(len(found.entries), 'matrix', 'matrices')} over "
            f"{counted(found.chunk_count * found.chunk_size, 'token')} in chunks of "
            f"{found.chunk_size}"
        )


def write_imatrix(
    model: str,
    text_file: Path,
    output: Path | None = None,
    *,
    context: int = 512,
    chunks: int | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Steps | None = None,
) -> WrittenImatrix:
    """Measure a model on a text and write the matrix to `output`, by default MODEL-imatrix.gguf.

    `model` is a name of `edgekit models`, a hub id or a folder, `context` the tokens of a chunk.
    EdgekitError for what `imatrix_of_text` refuses, and for an output that exists unless `force`.
    """
    text = read_text(text_file)
    if output is not None:
        check_output_file(output, force)  # before anything is downloaded
    source = resolve_model(model, revision=revision)
    path = output or Path(f"{source.short_name}-imatrix.gguf")
    check_output_file(path, force)
    found = imatrix_of_text(
        source, text, text_file.name, context=context, chunks=chunks, progress=progress
    )
    found.save(path)
    return WrittenImatrix(path, source.id, source.revision, text_file.name, found)


def imatrix_of_text(
    source: ModelSource,
    text: str,
    dataset: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    progress: Steps | None = None,
) -> Imatrix:
    """Run the float model over a text and return the squares of what its linears were given.

    `dataset` is what the file calls the text; `chunks` bounds how many chunks of `context` tokens
    are run. EdgekitError for a text that is too short, a context that does not fit, and
    activations that are not finite.
    """
    if source.folder is None:
        raise EdgekitError(f"{source.id}: random weights have no tokenizer to read a text with")
    pieces = _pieces(Tokenizer.load(source.folder), text, context, chunks, source.config)
    sums = _Sums(float_reader(source.config, source.checkpoint))
    model = Decoder(sums, source.config.architecture, context).eval()
    start = torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        for done, piece in enumerate(pieces, start=1):
            model.all_logits(torch.tensor([piece]), start)
            if progress is not None:
                progress(done, len(pieces), "chunks")
    count = len(pieces) * context
    names = gguf_names(source.config)
    entries = {
        names[name]: Statistics(_finite(name, squares), count)
        for name, squares in sums.squares.items()
    }
    return Imatrix(entries, (dataset,), len(pieces), context)


def _pieces(
    tokenizer: Tokenizer, text: str, context: int, limit: int | None, config: ModelConfig
) -> list[list[int]]:
    if not LEAST_CONTEXT <= context <= config.max_context:
        raise EdgekitError(
            f"`context` {context}: the model takes {LEAST_CONTEXT} to {config.max_context} tokens"
        )
    tokens = tokenize(tokenizer, text)
    if max(tokens, default=0) >= config.vocab_size:
        raise EdgekitError(f"the tokenizer's token {max(tokens)} lies outside the vocabulary")
    return cut(tokens, context, limit, tokenizer.bos_id if tokenizer.adds_bos else None)


def _finite(name: str, squares: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = squares.float().numpy()
    if not np.isfinite(values).all():
        raise EdgekitError(f"{name}: its inputs are not finite on this text")
    return values


class _Sums(EagerBlocks):
    """The eager operators; `squares` holds float64 `[columns]` by checkpoint name."""

    def __init__(self, read: ReadWeight) -> None:
        super().__init__(read)
        self.squares: dict[str, Tensor] = {}

    def linear(self, linear: Linear, part: int = 0, parts: int = 1) -> nn.Module:
        """Sum what goes in; blocks of one matrix share their input, so the first stands for all."""
        if linear.weight.role == "head":
            return nn.Identity()  # llama-imatrix leaves the head out, and nobody asks for logits
        module = super().linear(linear, part, parts)
        if part == 0:
            module.register_forward_pre_hook(partial(self._add, linear.weight.name))
        return module

    def _add(self, name: str, _module: nn.Module, inputs: Sequence[Tensor]) -> None:
        squares = inputs[0].square().sum(0, dtype=torch.float64)
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares
