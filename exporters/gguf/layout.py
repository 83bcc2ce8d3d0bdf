"""What a GGUF can hold, and in how many bytes."""

import math
from collections.abc import Sequence

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options
from edgekit.exporters.gguf.architectures import check_blocks
from edgekit.exporters.gguf.block_types import BLOCK, BLOCKS, block_type
from edgekit.models.architecture import Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved, Table

NAME = "gguf"
ENGINE = "llama.cpp"
MODEL_FILE = "model.gguf"
OPTIONS = frozenset({"llama_format", "imatrix"})
BLOCK_KINDS = (Attention, ShortConv, GatedMlp)
NATIVE_SCHEMES = frozenset({"cb4nl", "w5g32", "w6g16"})
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp's src/llama-hparams.h


def check_config(config: ModelConfig, options: Options) -> None:
    """Refuse models with which llama.cpp would end the process, and blocks that it has not."""
    if config.num_layers > MOST_LAYERS:
        raise EdgekitError(
            f"config: num_hidden_layers is {config.num_layers}; llama.cpp takes up to "
            f"{MOST_LAYERS}: give target executorch or onnx"
        )
    check_blocks(config)


def check_rows(rows: Sequence[Resolved]) -> None:
    """Refuse, before any work, what ggml's blocks cannot hold."""
    for row in rows:
        if not row.scheme.is_float and row.shape[-1] % BLOCK:
            raise EdgekitError(
                f"{row.tensor}: target gguf cannot hold {row.scheme.name} in rows of "
                f"{row.shape[-1]}: its blocks are of {BLOCK} weights; float holds any"
            )
        if row.scheme.bits == 8 and (row.scheme.group_size or BLOCK) % BLOCK:
            raise EdgekitError(
                f"{row.tensor}: target gguf cannot hold {row.scheme.name}: its 8-bit blocks are of "
                f"{BLOCK} weights; for groups of {row.scheme.group_size} give w6g16"
            )


def stored_once(table: Table) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name: a tied head."""
    return list(table.shared)


def stored_bytes(row: Resolved) -> int:
    """Return the bytes of a tensor in the file: each block has its own scale always."""
    if row.scheme.is_float:
        return row.nbytes
    weights, nbytes = BLOCKS[block_type(row.scheme)]
    return math.prod(row.shape) // weights * nbytes


def model_file(rows: Sequence[Resolved], options: Options) -> str:
    """Return the file's name."""
    return MODEL_FILE


def requires(options: Options) -> dict[str, str]:
    """Return nothing: whether a file loads is a matter of its own metadata."""
    return {}
