"""llama.cpp's own quantization of rows, through its C functions.

quantize(rows (128, 1024) float32, "Q4_K") -> (128, 576) bytes; dequantize(those, "Q4_K") -> (128, 1024) float32
"""

import ctypes

import gguf
import numpy as np

from sg_local.gguf_io.grid import Bytes
from sg_local.gguf_io.tensors import Floats


def quantize(values: Floats, type_name: str) -> Bytes:
    """Rows (n_rows, n_columns) as llama.cpp quantizes them, (n_rows, row_bytes)."""
    from llama_cpp._ggml import libggml

    n_rows, n_columns = values.shape
    kind = gguf.GGMLQuantizationType[type_name]
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.empty((n_rows, n_columns // block_elements * block_bytes), np.uint8)
    requires_importance = libggml.ggml_quantize_requires_imatrix  # bool (type): the coarsest types
    requires_importance.restype, requires_importance.argtypes = ctypes.c_bool, [ctypes.c_int]
    importance = np.ones(n_columns, np.float32)  # all alike
    matrix = importance.ctypes.data if requires_importance(int(kind)) else None
    # ggml.h: size_t ggml_quantize_chunk(type, src, dst, start, nrows, n_per_row, imatrix)
    function = libggml.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    written = function(int(kind), values.ctypes.data, rows.ctypes.data, 0, n_rows, n_columns, matrix)
    assert written == rows.nbytes
    return rows


def dequantize(rows: Bytes, type_name: str) -> Floats:
    values: Floats = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name])
    return values
