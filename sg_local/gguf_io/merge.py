"""Merges a LoRA adapter into its base: two GGUF files in, the merged model out, several tensors at a time.

    blk.0.attn_q.weight (576, 576) Q4_1: + alpha/rank · B · A, on the grid of its blocks (see grid.py)
    blk.0.attn_norm.weight (576,) F32: no LoRA, its bytes are copied

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The metadata is copied from the base, byte for byte.
Each tensor has its place in the file and its own seed, so threads write them in any order; a block of rows of each is
in memory.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from sg_local.dimensions import read_dimensions
from sg_local.errors import InputError, SgLocalError
from sg_local.files import Faults, atomic_path
from sg_local.gguf_header import (
    DEFAULT_ALIGNMENT_BYTES,
    GgufHeader,
    TensorInfo,
    read_model_header,
    require_supported,
)
from sg_local.gguf_io.adapter import Adapter, base_matrices, read_adapter_gguf
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.grid import GRIDS, add_on_grid, round_to_bfloat16
from sg_local.gguf_io.layout import OutputTensor, raw_metadata, string_value, uint32_value, write_header
from sg_local.gguf_io.tensors import (
    Floats,
    byte_rows,
    in_threads,
    model_tensors,
    not_finite,
    quantization,
    row_blocks,
)

FINGERPRINT_KEY = "sg_local.base_fingerprint"

_BLOCK_ELEMENTS = 32  # of Q8_0

# Types in which any tensor can be written → general.file_type of a model that has mostly this type.
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}
_LARGEST = {
    "F32": float(np.finfo(np.float32).max),
    "F16": 65504.0,
    "BF16": 2.0**128 - 2.0**120,
    "Q8_0": 65504.0 * 127,  # the step of a block is an F16
}


def merge_gguf(
    base_path: Path,
    adapter_path: Path,
    out_path: Path,
    *,
    metadata: Mapping[str, str],
    matrix_type: str | None = None,
    types: Mapping[str, str] | None = None,
    force: bool = False,
    n_threads: int = 0,
) -> None:
    """Writes the base model with the adapter added to its weights. The same arguments give the same bytes.

    metadata: string keys that are added to those of the base, or replace them; all others stay as they are.
    matrix_type: "F16" (or F32, BF16, Q8_0): every matrix gets this type, and general.file_type says so. None: every
        tensor keeps its type, and without LoRA also its bytes.
    types: types of single tensors by their names, of the same ones; general.file_type does not tell of them.
    force: merge even if the adapter is for another base (its key sg_local.base_fingerprint).
    n_threads: tensors in the making at a time, 0 for one on each processor; the bytes do not depend on it.

    Raises:
        InputError: a file cannot be read, the adapter is for another base, or its tensors do not fit. All
            faults are named, a line each.
        SgLocalError: a merged value does not fit its type, or `out_path` could not be written.
    """
    types = dict(types or {})
    for wanted in {matrix_type, *types.values()} - {None, *_FILE_TYPES}:
        raise InputError(f"matrices cannot be written as {wanted!r}; choose of {', '.join(_FILE_TYPES)}")
    base = read_model_header(base_path)
    require_supported(base)
    if out_path.exists() and out_path.samefile(base_path):
        raise InputError(f"{out_path} is the base model itself; give another path for the merged one")
    adapter = read_adapter_gguf(adapter_path)
    _check_fit(base, adapter_path, adapter, matrix_type, types, force)
    values = _merged_metadata(base, metadata, matrix_type)

    outputs = []
    expected = model_tensors(base, read_dimensions(base))
    for tensor in base.tensors:
        known = expected.get(tensor.name)
        is_matrix = len(tensor.shape) == 2 and not (
            known and known.is_kernel
        )  # llama.cpp leaves kernels alone
        type_name = types.get(tensor.name, matrix_type if matrix_type and is_matrix else tensor.type_name)
        if type_name == "Q8_0" != tensor.type_name and tensor.shape[0] % _BLOCK_ELEMENTS:
            type_name = "F16"  # as llama.cpp does with rows that are no whole blocks
        outputs.append(OutputTensor(tensor.name, tensor.shape, type_name, _size_bytes(tensor, type_name)))
    alignment_bytes = base.metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    assert isinstance(alignment_bytes, int)  # read_model_header checked it
    with atomic_path(out_path) as temporary, open(temporary, "wb") as file:
        write_header(file, values, outputs, alignment_bytes)
        places = []
        position = file.tell()
        for output in outputs:
            places.append(position)
            position += output.size_bytes + -output.size_bytes % alignment_bytes
        file.truncate(position)  # what nothing is written to, between tensors, is zeros

        def write(tensor: TensorInfo, output: OutputTensor, place: int) -> None:
            with open(temporary, "r+b") as part:
                part.seek(place)
                for data in _tensor_data(base, tensor, adapter, output.type_name):
                    part.write(data.data)

        for _ in in_threads(write, n_threads, base.tensors, outputs, places):
            pass


def unmergeable_types(header: GgufHeader, names: Iterable[str]) -> list[str]:
    """The types of these tensors of a base that nothing can be added to: their grids are not even."""
    wanted = set(names)
    types = {tensor.type_name for tensor in header.tensors if tensor.name in wanted}
    return sorted(types - {*GRIDS, *_FILE_TYPES})


def _check_fit(
    base: GgufHeader,
    adapter_path: Path,
    adapter: Adapter,
    matrix_type: str | None,
    types: Mapping[str, str],
    force: bool,
) -> None:
    faults = Faults()
    architecture = adapter.metadata["general.architecture"]
    if architecture != base.architecture:
        faults.add(f"{adapter_path} is for the architecture {architecture!r:.40}, not {base.architecture!r}")
    adapter_fingerprint = adapter.metadata.get(FINGERPRINT_KEY)
    if adapter_fingerprint is not None and not force:
        base_fingerprint = fingerprint(base.path)
        if adapter_fingerprint != base_fingerprint:
            faults.add(
                f"{adapter_path} was trained on another base (fingerprint {adapter_fingerprint!r:.16}…) than "
                f"{base.path} ({base_fingerprint[:12]}…): give that base"
            )
    matrices = base_matrices(base)
    unmergeable = unmergeable_types(base, adapter.tensors.keys() - types.keys())
    if unmergeable and matrix_type is None:
        faults.add(
            f"{base.path} has matrices of the type {', '.join(unmergeable)}, in which nothing can be merged: "
            "take --quant Q8_0"
        )
    for name, (a, b) in adapter.tensors.items():
        if name not in matrices:
            faults.add(f"{adapter_path}: {base.path} has no layer's matrix {name!r:.80}")
        elif (b.shape[0], a.shape[1]) != matrices[name].shape:
            faults.add(
                f"{adapter_path}: {name} is for the shape {(b.shape[0], a.shape[1])}, and {base.path} has "
                f"{matrices[name].shape}"
            )
    faults.raise_any()


def _tensor_data(
    base: GgufHeader, tensor: TensorInfo, adapter: Adapter, type_name: str
) -> Iterator[npt.NDArray[Any]]:
    """The bytes of a tensor for the merged file, a block of rows at a time."""
    has_lora = tensor.name in adapter.tensors
    if type_name == tensor.type_name and not has_lora:
        for _, rows in byte_rows(base, tensor):
            yield rows
        return
    # Seeded, so that the same input files give the same output file.
    rng = np.random.default_rng(list(tensor.name.encode()))
    if type_name == tensor.type_name and type_name in GRIDS:
        for start, rows in byte_rows(base, tensor):
            change = _change(adapter, tensor, start, len(rows))
            try:
                yield add_on_grid(rows, change, type_name, rng)
            except ValueError as error:
                raise not_finite(base, tensor) from error
        return
    for start, values in row_blocks(base, tensor):
        if has_lora:
            with np.errstate(over="ignore"):  # checked below
                values += _change(adapter, tensor, start, len(values))
        largest = float(np.abs(values).max())
        if largest > _LARGEST[type_name]:
            advice = (
                "train with a lower learning rate" if has_lora else "keep the base's types with --quant base"
            )
            raise SgLocalError(
                f"tensor {tensor.name} of the merged model reaches {largest:.6g}, which {type_name} cannot hold: "
                + advice
            )
        if type_name == "BF16" and has_lora:
            yield round_to_bfloat16(values, rng)
        else:
            yield gguf.quants.quantize(values, quantization(type_name))


def _change(adapter: Adapter, tensor: TensorInfo, start: int, n_rows: int) -> Floats:
    """What the adapter adds to these rows of a tensor."""
    a, b = adapter.tensors[tensor.name]
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: Floats = (b[start : start + n_rows] * adapter.scale_of(tensor.name)).astype(
            np.float32, copy=False
        )
        change = scaled @ a
    if not np.isfinite(change).all():
        raise SgLocalError(
            f"what the adapter adds to tensor {tensor.name} is too large for float32: "
            "train with a lower learning rate"
        )
    return change


def _size_bytes(tensor: TensorInfo, type_name: str) -> int:
    if type_name == tensor.type_name:
        return tensor.size_bytes
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantization(type_name)]
    return math.prod(tensor.shape) // int(block_elements) * int(block_bytes)


def _merged_metadata(
    base: GgufHeader, metadata: Mapping[str, str], matrix_type: str | None
) -> dict[str, bytes]:
    values = raw_metadata(base)
    for key, text in metadata.items():
        if not isinstance(base.metadata.get(key, ""), str):
            raise InputError(f"metadata key {key} is not a string in {base.path}: choose another key")
        values[key] = string_value(text)
    if matrix_type:
        values["general.file_type"] = uint32_value(_FILE_TYPES[matrix_type])
    return values
