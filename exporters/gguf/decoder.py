"""Target `gguf`: one file with weights and tokenizer, for llama.cpp and what is built on it.

Keys and tensors are those that llama.cpp's architectures load (src/models/), their values what its
converter writes (conversion/).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.exporters.contract.writer import Job
from edgekit.exporters.gguf.architectures import find_architecture
from edgekit.exporters.gguf.block_types import BLOCK, SUPER_BLOCK
from edgekit.exporters.gguf.blocks import FLOAT_TYPES, block_pieces, float_pieces
from edgekit.exporters.gguf.layout import MODEL_FILE, stored_once
from edgekit.exporters.gguf.llama.formats import FORMATS
from edgekit.exporters.gguf.llama.quantize import quantize_gguf
from edgekit.exporters.gguf.names import ROPE_DIVISORS, gguf_names
from edgekit.exporters.gguf.planned import (
    divisor_tensors,
    model_metadata,
    planned_tensor,
    rope_divisors,
)
from edgekit.exporters.gguf.row_orders import row_orders
from edgekit.exporters.gguf.tokenizer import STAND_IN, stand_in_metadata, tokenizer_metadata
from edgekit.formats.gguf.sampling import sampling_metadata
from edgekit.formats.gguf.writer import PlannedTensor, Value, write_gguf
from edgekit.models.activations import per_block
from edgekit.models.stated_sampling import stated_sampling
from edgekit.models.tokenizer import TOKENIZER_FILE
from edgekit.quantize.schemes import super_blocks
from edgekit.quantize.tensor import QuantizedTensor, Weight

MAX_CHECK_TOKENS = 256  # the loops over positions are llama.cpp's

_FLOAT_FILE = "float.gguf"
# enum llama_ftype (include/llama.h): what most of the weights are stored as
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q6_K": 18}
_FILE_TYPES |= {"IQ4_NL": 25, "BF16": 32}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


def fake_quantize(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round the inputs of a linear as ggml does for its types: Q6_K takes `block_q8_K`.

    All others that are used here take `block_q8_0`.
    """
    # By the groups and not `two_levels`: to be verified, w6g16 is read back as w8g16.
    if weight.group_size == super_blocks.GROUP:
        return per_block(x, SUPER_BLOCK)
    return per_block(x, BLOCK, torch.float16)


def write(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Write `model.gguf`, one tensor after the other.

    One of llama.cpp's own formats is made of a float file, which is removed afterwards.
    """
    form = job.options.llama_format
    if form is None:
        progress("writing the file")
        _write_rows(job, folder / MODEL_FILE)
        return
    progress("writing the float file")
    floats = folder / _FLOAT_FILE
    try:
        _write_rows(job, floats)
        imatrix = job.options.imatrix
        quantize_gguf(floats, folder / MODEL_FILE, FORMATS[form], progress, imatrix=imatrix)
    finally:
        floats.unlink(missing_ok=True)


def _write_rows(job: Job, path: Path) -> None:
    once = stored_once(job.table)
    stored = gguf_names(job.config)
    names = {stored[row.tensor]: row.tensor for row in job.table if row.tensor not in once}
    orders = row_orders(job.config)
    rows = {row.tensor: row for row in job.table}
    kinds = _float_types(job)
    planned = [planned_tensor(rows[source], name, kinds) for name, source in names.items()]
    planned += divisor_tensors(job.config)

    def pieces(tensor: PlannedTensor) -> Iterable[NDArray[np.uint8]]:
        if tensor.name == ROPE_DIVISORS:
            return float_pieces(tensor.name, torch.tensor(rope_divisors(job.config)), tensor.type)
        weight = _in_order(job.weights[names[tensor.name]], orders.get(names[tensor.name]))
        if isinstance(weight, QuantizedTensor):
            return block_pieces(names[tensor.name], weight)
        return float_pieces(names[tensor.name], weight, tensor.type)

    write_gguf(path, _metadata(job, planned), planned, pieces)


def _in_order(weight: Weight, order: Tensor | None) -> Weight:
    if order is None:
        return weight
    return weight[order] if isinstance(weight, Tensor) else weight.rows(order)


def check_tokenizer(path: Path, folder: Path) -> dict[str, int]:
    """Compare llama.cpp's ids with those of tokenizer.json over a corpus."""
    from edgekit.exporters.gguf.tokenizer_check import check_tokenizer as check

    return check(path, folder)


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes: only our own code does."""
    return {}


def _float_types(job: Job) -> dict[str, str]:
    """Return what the float tensors are stored as: a matrix as it is in the checkpoint.

    Norms and convolutions are float32 always: llama.cpp ends the process at others.
    """
    return {
        row.tensor: FLOAT_TYPES[job.weights.dtype(row.tensor)] if len(row.shape) == 2 else "F32"
        for row in job.table
        if row.scheme.is_float
    }


def _metadata(job: Job, tensors: Sequence[PlannedTensor]) -> dict[str, Value]:
    tokenizer = _tokenizer(job)
    general: dict[str, Value] = {
        "general.architecture": find_architecture(job.config).name,
        "general.type": "model",
        "general.name": job.id,
    }
    if tokenizer is None:
        general["general.description"] = STAND_IN
    return {
        **general,
        **sampling_metadata({} if job.folder is None else stated_sampling(job.folder)),
        "general.file_type": _FILE_TYPES[_main_type(tensors)],
        "general.quantization_version": _QUANTIZATION_VERSION,
        **model_metadata(job.config, tensors),
        **(tokenizer or stand_in_metadata(job.config)),
    }


def _main_type(tensors: Sequence[PlannedTensor]) -> str:
    """Return the type of most weights."""
    counts = Counter[str]()
    for tensor in tensors:
        counts[tensor.type] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _tokenizer(job: Job) -> dict[str, Value] | None:
    """Return the tokenizer's keys, None where random weights come without one."""
    if job.folder is None or not (job.folder / TOKENIZER_FILE).is_file():
        return None
    return tokenizer_metadata(job.folder, job.config)
