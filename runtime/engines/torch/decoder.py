"""The reference engine: a torch module run eagerly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from edgekit.common.last_words import engine_on, engine_works
from edgekit.errors import EdgekitError
from edgekit.metrics.logits import Logits
from edgekit.models.eager import build_eager, float_reader
from edgekit.models.source import resolve_model
from edgekit.runtime.engines.engine import (
    OneSequenceEngine,
    Threads,
    TokenIds,
    check_first,
    check_tokens,
)


class TorchEngine(OneSequenceEngine):
    """Runs a module `forward(tokens int64 [1, n], input_pos int64 [1]) -> float [1, vocab]`.

    The module keeps its state in buffers and starts it anew at position 0.
    """

    name = "torch"
    version = str(torch.__version__)

    def __init__(
        self,
        module: nn.Module,
        context: int,
        vocab_size: int,
        threads: int | None = None,
        name: str = "a module",
    ) -> None:
        """Run `module`, whose state holds `context` positions; `name` is what errors call it."""
        with engine_on(self.name, Path(name)):
            super().__init__()
        self.threads = Threads.for_both(threads)
        torch.set_num_threads(self.threads.prompt)
        self.context = self.longest_chunk = self.default_chunk = context
        self.vocab_size = vocab_size
        self._module: nn.Module | None = module.eval()

    @classmethod
    def from_model(cls, name: str, context: int | None = None, threads: int | None = None) -> Self:
        """Open a catalogue name, hub id or folder as the float model it is."""
        source = resolve_model(name)
        longest = source.config.max_context
        if context is not None and not 1 <= context <= longest:
            raise EdgekitError(f"context must be 1 to {longest} for {source.id}, not {context}")
        context = context or source.config.default_context
        read = float_reader(source.config, source.checkpoint)
        module = build_eager(source.config, read, context)
        return cls(module, context, source.config.vocab_size, threads, name)

    def _forward(self, tokens: TokenIds, position: int) -> Logits:
        module = cast(nn.Module, self._module)
        with torch.inference_mode():
            start = torch.tensor([position], dtype=torch.int64)
            logits: Tensor = module(torch.from_numpy(tokens).view(1, -1), start)
            return cast(Logits, logits.float().view(-1).numpy().copy())

    def score(self, tokens: Sequence[int], first: int) -> Logits:
        """Process tokens in one pass where the module has `all_logits`, as an LFM2 does."""
        whole = getattr(self._module, "all_logits", None)
        if whole is None:
            return super().score(tokens, first)
        check_first(first, len(tokens))
        engine_works(self._number)
        ids = check_tokens(tokens, 0, self.context, self.vocab_size)
        with torch.inference_mode():
            logits: Tensor = whole(torch.from_numpy(ids).view(1, -1), torch.zeros(1).long())
        self._position = len(ids)
        return cast(Logits, logits[first:].float().numpy())

    def close(self) -> None:
        """Release the module."""
        super().close()
        self._module = None


def open_engine(model_path: Path, threads: int | None, context: int | None) -> TorchEngine:
    """Open a model folder in Hugging Face layout."""
    return TorchEngine.from_model(str(model_path), context, threads)
