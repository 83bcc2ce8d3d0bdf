"""What an ONNX model for ONNX Runtime can hold, and in how many bytes."""

import math
from collections.abc import Sequence

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.layout import Options
from edgekit.models.architecture import Attention, GatedMlp, ShortConv
from edgekit.models.config import ModelConfig
from edgekit.quantize.recipe import Resolved, Table
from edgekit.quantize.schemes.affine import Affine

NAME = "onnx"
ENGINE = "ONNX Runtime"
OPTIONS = frozenset({"abi", "portable"})
BLOCK_KINDS = (Attention, ShortConv, GatedMlp)
NATIVE_SCHEMES: frozenset[str] = frozenset()
SCHEMES = "float, w8, w4, w8gN, w4gN and w4gNa"
OPSET = 21
"""ONNX 1.16: the first with types of 4 bits and scales of blocks."""
ROTATED = 16
"""CheckRotaryCaches in contrib_ops/cpu/bert/group_query_attention_helper.h of onnxruntime."""
COLUMNS = 32
"""The operators take blocks from 16 on; below 32 they were not tested here."""
LARGEST_BLOCK = 256
"""Codes that share a scale at most; a scale of more codes is repeated.

Older releases returned zeros at 512 (onnxruntime#28551). On an AVX512-VNNI core with onnxruntime
1.32 blocks of 256 are as fast as blocks of a whole row.
"""


def check_config(config: ModelConfig, options: Options) -> None:
    """Refuse heads that ONNX Runtime's attention does not rotate."""
    if options.portable or not config.architecture.attentions():
        return
    if config.head_dim % ROTATED:
        raise EdgekitError(
            f"config: head_dim is {config.head_dim}; ONNX Runtime's GroupQueryAttention rotates "
            f"heads of multiples of {ROTATED}: give `portable`, or another target"
        )


def check_rows(rows: Sequence[Resolved]) -> None:
    """Refuse, before any work, what ONNX Runtime's operators cannot hold."""
    for row in rows:
        if row.scheme.bits not in (None, 4, 8):
            raise EdgekitError(
                f"{row.tensor}: target onnx cannot hold {row.scheme.name}; it holds {SCHEMES}"
            )
        if row.scheme.bits is not None and row.shape[-1] % COLUMNS:
            raise EdgekitError(
                f"{row.tensor}: target onnx cannot hold {row.scheme.name} in rows of "
                f"{row.shape[-1]}; their length must be a multiple of {COLUMNS}, else only float"
            )


def stored_once(table: Table) -> list[str]:
    """Return the tensors whose bytes the file holds under another's name."""
    return list(table.shared)


def model_file(rows: Sequence[Resolved], options: Options) -> str:
    """Return the name that the runtime looks for, with its folder."""
    if options.abi == "genai":
        return "model.onnx"
    return f"onnx/model{dtype_names(rows)[1]}.onnx"


def requires(options: Options) -> dict[str, str]:
    """Return what runs the file; the oldest release that was tried and computes it rightly."""
    if options.portable:
        return {"opset": str(OPSET), "onnxruntime": ">=1.20"}
    # GatherBlockQuantized of uint8 comes with 1.23, CausalConvWithState with 1.25.1.
    least = "1.25.1" if options.abi == "genai" else "1.23"
    return {"opset": str(OPSET), "com.microsoft": "1", "onnxruntime": f">={least}"}


def stored_bytes(row: Resolved) -> int:
    """Return the bytes of a tensor in the file: a block has a scale of float32 of its own.

    And a zero point where the scheme has one.
    """
    if not isinstance(row.scheme, Affine):
        return row.nbytes
    count = math.prod(row.shape)
    blocks = count // block_size(row.shape[1], row.scheme.group_size)
    zero_points = 0 if row.scheme.symmetric else blocks * row.scheme.bits // 8
    return count * row.scheme.bits // 8 + 4 * blocks + zero_points


def block_size(columns: int, group_size: int | None) -> int:
    """Return the largest block that a scale of `group_size` codes (None: a row) can be of."""
    shared = group_size or columns
    return min(shared & -shared, LARGEST_BLOCK)


def dtype_names(rows: Sequence[Resolved]) -> tuple[str, str]:
    """Return Transformers.js's name of the smallest type, and how its file's name ends.

    src/utils/dtypes.js, DEFAULT_DTYPE_SUFFIX_MAPPING.
    """
    bits = min((row.scheme.bits for row in rows if row.scheme.bits), default=None)
    return {4: ("q4", "_q4"), 8: ("q8", "_quantized"), None: ("fp32", "")}[bits]
