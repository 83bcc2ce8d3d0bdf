"""ggml's own quantization and dequantization, called directly: what files are held against."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

_FLOATS = ctypes.POINTER(ctypes.c_float)
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _FLOATS, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits` (ggml/include/ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
    ]


@cache
def _library() -> Any:  # noqa: ANN401 - ctypes
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, _FLOATS, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _FLOATS),
    ]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return library


def quantize(
    values: NDArray[np.float32],
    kind: GGMLQuantizationType,
    imatrix: NDArray[np.float32] | None = None,
) -> bytes:
    """Return the bytes of `values` [rows, columns] by `ggml_quantize_chunk`."""
    rows, columns = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.empty(values.size // block * block_bytes, np.uint8)
    weights = None if imatrix is None else imatrix.ctypes.data_as(_FLOATS)
    source = np.ascontiguousarray(values).ctypes.data_as(_FLOATS)
    made = _library().ggml_quantize_chunk(kind, source, out.ctypes.data, 0, rows, columns, weights)
    assert made == out.size
    return out.tobytes()


def round_to_q8_k(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return inputs as `quantize_row_q8_K_ref` rounds them, which Q6_K is multiplied by."""
    kind = np.dtype([("d", "<f4"), ("q", "i1", 256), ("sums", "<i2", 16)])
    blocks = np.empty(values.size // 256, kind)
    source = np.ascontiguousarray(values).ctypes.data_as(_FLOATS)
    rounding = _library().quantize_row_q8_K_ref
    rounding.restype, rounding.argtypes = None, [_FLOATS, ctypes.c_void_p, ctypes.c_int64]
    rounding(source, blocks.ctypes.data, values.size)
    floats: NDArray[np.float32] = blocks["q"] * blocks["d"][:, None]
    return floats.reshape(values.shape)


def dequantize(data: bytes, kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Return the floats of whole blocks by the type's own `to_float`."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    out = np.empty(len(data) // block_bytes * block, np.float32)
    to_float = _library().ggml_get_type_traits(kind).contents.to_float
    to_float(data, out.ctypes.data_as(_FLOATS), out.size)
    return out
