"""Target `executorch`: a `.pte` whose linears run in XNNPACK, for ExecuTorch's LLM runners."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from edgekit.exporters.contract.weights import Weights
from edgekit.exporters.contract.writer import Job
from edgekit.exporters.executorch.layout import MODEL_FILE
from edgekit.models.activations import per_token
from edgekit.models.config import ModelConfig
from edgekit.quantize.tensor import QuantizedTensor, Weight

MAX_CHECK_TOKENS = 4096  # attention grows with its square, to hours at 32,768 tokens
PACKAGES = ("executorch", "torch")


def fake_quantize(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round the inputs of a linear as XNNPACK does."""
    return per_token(x, weight)


def write(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Write `model.pte`; the codes are forgotten on the way."""
    export_pte(job.config, job.weights, job.context, folder / MODEL_FILE, progress)


def export_pte(
    config: ModelConfig,
    weights: Weights | dict[str, Weight],
    context: int,
    path: Path,
    progress: Callable[[str], None],
) -> None:
    """Write the model as `path`: the weights' codes and scales become its constants verbatim.

    `weights` is emptied on the way, so that no weight is held longer than it is needed.
    """
    from edgekit.exporters.executorch.blocks import XnnpackBlocks
    from edgekit.exporters.executorch.lowering import (
        delegate,
        plan_memory,
        release_traces,
        trace,
        write_program,
    )
    from edgekit.exporters.executorch.sharing import store_once
    from edgekit.models.decoder import Decoder

    progress("tracing")
    model = Decoder(XnnpackBlocks(weights.__getitem__), config.architecture, context).eval()
    weights.clear()
    traced = trace(model)
    del model
    progress("lowering to XNNPACK")
    edge = delegate(traced, runner_metadata(config, context))
    del traced
    release_traces()
    progress("planning memory")
    program = plan_memory(edge)
    progress("writing the program")
    write_program(program, path)
    del edge, program
    release_traces()
    store_once(path)


def runner_metadata(config: ModelConfig, context: int) -> dict[str, Any]:
    """Return the constant methods that ExecuTorch's LLM runner reads (extension/llm/runner).

    `get_prefill_chunk` is for edgekit's engine: prompts are fastest in pieces of that length.
    """
    from edgekit.exporters.executorch.blocks import PREFILL_CHUNK

    return {
        "get_prefill_chunk": min(PREFILL_CHUNK, context),
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": config.num_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_bos_id": config.bos_id,
        "get_eos_ids": list(config.eos_ids),
    }


def check_tokenizer(path: Path, folder: Path) -> dict[str, int]:
    """Return nothing: a `.pte` holds no tokenizer, its runners read tokenizer.json."""
    return {}


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes."""
    return {name: metadata.version(name) for name in PACKAGES}
