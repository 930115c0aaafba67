"""Reads safetensors files: where each tensor is, and its values as float32, also from bfloat16.

    model.safetensors → {"model.norm.weight": StoredTensor(dtype="BF16", shape=(576,), offset_bytes=34816, ...), ...}

Format: https://github.com/huggingface/safetensors. The safetensors package checks header and offsets. The values are
read here, a block of rows at a time, since the package has no bfloat16 for numpy.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sg_local.errors import InputError

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; its values can be read where `dtype` is one of DTYPES."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    def values(self) -> npt.NDArray[np.float32]:
        return self._read(0, math.prod(self.shape)).reshape(self.shape)

    def rows(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """`count` rows of a matrix, from row `first` on."""
        row_elements = math.prod(self.shape[1:])
        return self._read(first * row_elements, count * row_elements).reshape(count, *self.shape[1:])

    def _read(self, first: int, count: int) -> npt.NDArray[np.float32]:
        dtype = np.dtype(DTYPES[self.dtype])
        try:
            raw: npt.NDArray[Any] = np.fromfile(
                self.path, dtype, count, offset=self.offset_bytes + first * dtype.itemsize
            )
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if len(raw) != count:
            raise InputError(f"{self.path} became shorter while it was read; leave it alone and run again")
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32; numpy has no type for it.
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(
            over="ignore"
        ):  # a float64 that is too large becomes infinite; the caller refuses it
            return raw.astype(np.float32, copy=False)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Name → tensor, for all of a file. Raises InputError if the file is missing, unreadable or damaged."""
    # Only finetuning has safetensors installed.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy"):
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(header_bytes))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: give a directory that holds it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}; get or make another copy") from error
    return {
        name: StoredTensor(
            path, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }
