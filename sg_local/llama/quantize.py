"""Converts a GGUF to another of llama.cpp's types.

    requantize(Path("smollm2.Q4_1.gguf"), Path("smollm2.F16.gguf"), "F16")

Source: llama.h `llama_model_quantize`, of the llama.cpp that llama-cpp-python carries.
"""

import os
from pathlib import Path

import llama_cpp

from sg_local.child_process import native_code_uses
from sg_local.errors import SgLocalError, says_write_failed
from sg_local.files import atomic_path
from sg_local.llama.library import last_messages, start_library

# llama.h, enum llama_ftype
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


def requantize(source: Path, target: Path, file_type: str, n_threads: int = 0) -> None:
    """Writes a copy of a model in another file type, one of FILE_TYPES. Complete or absent."""
    start_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[file_type]
    params.allow_requantize = True
    params.nthread = n_threads
    with atomic_path(target) as path, native_code_uses(source):
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), params) != 0:
            reason = last_messages()
            remedy = ": free some space on that disk" if says_write_failed(reason) else ""
            raise SgLocalError(
                f"{source} could not be written as {file_type} to {target.parent}: {reason}{remedy}"
            )
