"""Target `gguf`: one file with weights and tokenizer, for llama.cpp and what is built on it.

Keys and tensors are those that llama.cpp's architectures load (src/models/), their values what its
converter writes (conversion/).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekit.errors import EdgekitError, VerificationError
from edgekit.exporters.contract.target import Job, Options
from edgekit.exporters.gguf.architectures import check_blocks, find_architecture, model_keys
from edgekit.exporters.gguf.blocks import (
    BLOCK,
    BLOCKS,
    FLOAT_TYPES,
    SUPER_BLOCK,
    block_pieces,
    block_type,
    float_pieces,
)
from edgekit.exporters.gguf.llama.formats import FORMATS, LlamaFormat
from edgekit.exporters.gguf.llama.imatrix import Imatrix
from edgekit.exporters.gguf.llama.quantize import StoredTensor, planned_tensors, quantize_gguf
from edgekit.exporters.gguf.names import ROPE_DIVISORS, gguf_names, row_orders
from edgekit.exporters.gguf.tokenizer import STAND_IN, stand_in_metadata, tokenizer_metadata
from edgekit.formats.gguf.file import GgufFile
from edgekit.formats.gguf.sampling import sampling_metadata
from edgekit.formats.gguf.writer import PlannedTensor, Value, write_gguf, write_hollow_gguf
from edgekit.models.activations import per_block
from edgekit.models.architecture import Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.models.stated_sampling import stated_sampling
from edgekit.models.tokenizer import TOKENIZER_FILE
from edgekit.quantize import super_blocks
from edgekit.quantize.recipe import Resolved, shared_rows
from edgekit.quantize.tensor import QuantizedTensor, Weight

NAME = "gguf"
MODEL_FILE = "model.gguf"
ENGINE = "llama.cpp"
OPTIONS = frozenset({"llama_format", "imatrix"})
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS of llama.cpp's src/llama-hparams.h
BLOCK_KINDS = (Attention, ShortConv, GatedMlp)
HELD_AS_SUCH = frozenset({"cb4nl", "w5g32", "w6g16"})
LONGEST_CHECK = 256  # the loops over positions are llama.cpp's

_FLOAT_FILE = "float.gguf"
# enum llama_ftype (include/llama.h): what most of the weights are stored as
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q6_K": 18}
_FILE_TYPES |= {"IQ4_NL": 25, "BF16": 32}
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


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


def stored_once(rows: Sequence[Resolved], tied: Mapping[str, str]) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name: a tied head."""
    return list(shared_rows(rows, tied))


def stored_bytes(row: Resolved) -> int:
    """Return the bytes of a tensor in the file: each block has its own scale always."""
    if row.scheme.is_float:
        return row.nbytes
    weights, nbytes = BLOCKS[block_type(row.scheme)]
    return math.prod(row.shape) // weights * nbytes


def fake_quantize(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """Round the inputs of a linear as ggml does for its types: Q6_K takes `block_q8_K`.

    All others that are used here take `block_q8_0`.
    """
    # By the groups and not `two_levels`: to be verified, w6g16 is read back as w8g16.
    if weight.group_size == super_blocks.GROUP:
        return per_block(x, SUPER_BLOCK)
    return per_block(x, BLOCK, torch.float16)


def model_file(rows: Sequence[Resolved], options: Options) -> str:
    """Return the file's name."""
    return MODEL_FILE


def requires(options: Options) -> dict[str, str]:
    """Return nothing: whether a file loads is a matter of its own metadata."""
    return {}


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


def planned_table(
    config: ModelConfig,
    rows: Sequence[Resolved],
    tied: Mapping[str, str],
    form: LlamaFormat,
    imatrix: Path | None,
) -> list[dict[str, Any]]:
    """Return what one of llama.cpp's formats will store of float rows, as `table_json` does.

    `instead_of` is in a row whose length does not fit the type that the format wants. Needs no
    weights; EdgekitError where the imatrix is not of this model.
    """
    once = stored_once(rows, tied)
    names = gguf_names(config)
    sources = {names[row.tensor]: row for row in rows if row.tensor not in once}
    kinds = {row.tensor: "BF16" if len(row.shape) == 2 else "F32" for row in rows}
    floats = [_planned(row, name, kinds) for name, row in sources.items()] + _divisors(config)
    if imatrix is not None:
        shapes = {each.name: each.shape for each in floats}
        Imatrix.load(imatrix).check_model(imatrix, shapes)
    metadata = _model_metadata(config, floats)
    with TemporaryDirectory() as folder:
        hollow = Path(folder) / _FLOAT_FILE
        write_hollow_gguf(hollow, metadata, floats)
        made = {each.name: each for each in planned_tensors(hollow, form, imatrix)}
    return [_table_row(row, made[names[tied.get(row.tensor, row.tensor)]], tied) for row in rows]


def check_table(path: Path, config: ModelConfig, table: Sequence[Mapping[str, Any]]) -> None:
    """VerificationError where a written file does not store what `planned_table` said."""
    names = gguf_names(config)
    stored = {name: (each.type, each.nbytes) for name, each in GgufFile.open(path).tensors.items()}
    planned = {
        names[row["tensor"]]: (row["scheme"], row["bytes"]) for row in table if "same_as" not in row
    }
    planned |= {each.name: (each.type, each.nbytes) for each in _divisors(config)}
    for name in [*planned, *stored]:
        if planned.get(name) != stored.get(name):
            raise VerificationError(
                f"{name}: llama.cpp was to store it as {_said(planned.get(name))}, and the file "
                f"has {_said(stored.get(name))}"
            )


def _said(stored: tuple[str, int] | None) -> str:
    return "nothing" if stored is None else f"{stored[0]}, {stored[1]:,} bytes"


def _table_row(row: Resolved, made: StoredTensor, tied: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = row.to_dict() | {"scheme": made.type, "bytes": made.nbytes}
    entry["range"] = None
    if made.instead_of is not None:
        entry["instead_of"] = made.instead_of
    if row.tensor in tied:
        entry["same_as"] = tied[row.tensor]
    return entry


def _write_rows(job: Job, path: Path) -> None:
    once = stored_once(job.rows, job.tied)
    stored = gguf_names(job.config)
    names = {stored[row.tensor]: row.tensor for row in job.rows if row.tensor not in once}
    orders = row_orders(job.config)
    rows = {row.tensor: row for row in job.rows}
    kinds = _float_types(job)
    planned = [_planned(rows[source], name, kinds) for name, source in names.items()]
    planned += _divisors(job.config)

    def pieces(tensor: PlannedTensor) -> Iterable[NDArray[np.uint8]]:
        if tensor.name == ROPE_DIVISORS:
            return float_pieces(tensor.name, _rope_divisors(job.config), tensor.type)
        weight = _in_order(job.weights[names[tensor.name]], orders.get(names[tensor.name]))
        if isinstance(weight, QuantizedTensor):
            return block_pieces(names[tensor.name], weight)
        return float_pieces(names[tensor.name], weight, tensor.type)

    write_gguf(path, _metadata(job, planned), planned, pieces)


def _in_order(weight: Weight, order: Tensor | None) -> Weight:
    if order is None:
        return weight
    return weight[order] if isinstance(weight, Tensor) else weight.rows(order)


def _rope_divisors(config: ModelConfig) -> Tensor:
    return torch.tensor(config.rope.divisors(config.head_dim) or ())


def _divisors(config: ModelConfig) -> list[PlannedTensor]:
    """Return the tensor that slows the rotation down, none where nothing does."""
    count = len(_rope_divisors(config))
    return [PlannedTensor(ROPE_DIVISORS, "F32", (count,))] if count else []


def check_tokenizer(path: Path, folder: Path) -> dict[str, int]:
    """Compare llama.cpp's ids with those of tokenizer.json over a corpus."""
    from edgekit.exporters.gguf.tokenizer_check import check_tokenizer as check

    return check(path, folder)


def versions() -> dict[str, str]:
    """Return the versions that decided the file's bytes: only our own code does."""
    return {}


def _planned(row: Resolved, name: str, kinds: Mapping[str, str]) -> PlannedTensor:
    kind = kinds[row.tensor] if row.scheme.is_float else block_type(row.scheme)
    # a depthwise kernel [width, 1, taps] is stored without its middle axis
    shape = tuple(n for i, n in enumerate(row.shape) if len(row.shape) < 3 or i != 1)
    return PlannedTensor(name, kind, shape)


def _float_types(job: Job) -> dict[str, str]:
    """Return what the float tensors are stored as: a matrix as it is in the checkpoint.

    Norms and convolutions are float32 always: llama.cpp ends the process at others.
    """
    return {
        row.tensor: FLOAT_TYPES[job.weights.dtype(row.tensor)] if len(row.shape) == 2 else "F32"
        for row in job.rows
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
        **_model_metadata(job.config, tensors),
        **(tokenizer or stand_in_metadata(job.config)),
    }


def _main_type(tensors: Sequence[PlannedTensor]) -> str:
    """Return the type of most weights."""
    counts = Counter[str]()
    for tensor in tensors:
        counts[tensor.type] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _model_metadata(config: ModelConfig, tensors: Sequence[PlannedTensor]) -> dict[str, Value]:
    """The feed-forward length is that of the weights: the rule in config.json is easily misread."""
    return {
        "general.architecture": find_architecture(config).name,
        **model_keys(config, next(t.shape[0] for t in tensors if "ffn_gate" in t.name)),
    }


def _tokenizer(job: Job) -> dict[str, Value] | None:
    """Return the tokenizer's keys, None where random weights come without one."""
    if job.folder is None or not (job.folder / TOKENIZER_FILE).is_file():
        return None
    return tokenizer_metadata(job.folder, job.config)
