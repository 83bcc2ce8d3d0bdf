"""Prefill and decode speed of any LLM .pte by llama-bench's rules.

    python -m benchmarks.pte_speed MODEL.pte -p 512 -n 128 -r 5 -t 2

One loop for edgekit's files and for export_llm's, so that neither is measured by its own tool. Both
have `forward(tokens int64[1,n], input_pos int64[1])`. Prefill is one call with random tokens;
decode is N calls of one token each from an empty cache; no tokenizing and no sampling is in the
time, and an untimed call of each kind comes first. Prints JSON with the raw samples in ns.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers the embedding operators
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  attention and cache
from executorch.extension.pybindings import portable_lib


class Model:
    """A loaded program and the little of its interface that is measured."""

    def __init__(self, path: Path, threads: int) -> None:
        portable_lib._unsafe_reset_threadpool(threads)
        self.threads = portable_lib._threadpool_get_thread_count()
        self._module: Any = portable_lib._load_for_executorch(str(path))
        self.vocabulary = int(self._module.run_method("get_vocab_size", ())[0])

    def forward(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Run `tokens` (int64 [1, n]) at `position`; the logits live until the next call."""
        inputs = (tokens, torch.tensor([position]))
        logits: torch.Tensor = self._module.forward(inputs, clone_outputs=False)[0]
        return logits


def prefill(model: Model, count: int) -> None:
    model.forward(_random_tokens(model, count), 0)


def warm_up(model: Model, prompt: int) -> None:
    """Call both shapes once; raises ValueError if a logit is not finite."""
    for tokens, position in (_random_tokens(model, prompt), 0), (_random_tokens(model, 1), prompt):
        if not model.forward(tokens, position).isfinite().all():
            raise ValueError(f"a logit is not finite after {tokens.shape[1]} tokens")


def decode(model: Model, count: int) -> None:
    tokens = _random_tokens(model, count)
    for position in range(count):
        model.forward(tokens[:, position : position + 1], position)


def _random_tokens(model: Model, count: int) -> torch.Tensor:
    return torch.randint(model.vocabulary, (1, count))


def timed_ns(work: Callable[[], None]) -> int:
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start


def measure(model: Model, prompt: int, generate: int, repetitions: int) -> dict[str, list[int]]:
    """Return the samples in ns: whole prompts, and whole generations of `generate` tokens."""
    warm_up(model, prompt)
    return {
        "prefill_ns": [timed_ns(lambda: prefill(model, prompt)) for _ in range(repetitions)],
        "decode_ns": [timed_ns(lambda: decode(model, generate)) for _ in range(repetitions)],
    }


def resident_bytes() -> int:
    """Return this process's memory now: Python, torch and the engine before a model is loaded."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--generate", type=int, default=128)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    empty = resident_bytes()
    model = Model(arguments.model, arguments.threads)
    samples = measure(model, arguments.prompt, arguments.generate, arguments.repetitions)
    record = {
        "engine": f"executorch {version('executorch')}",
        "threads": model.threads,
        "prompt": arguments.prompt,
        "generate": arguments.generate,
        "empty_bytes": empty,
        **samples,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
