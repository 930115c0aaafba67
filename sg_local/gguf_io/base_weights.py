"""Writes the weights of a GGUF as a Hugging Face checkpoint, so that training starts from the served weights.

    SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB → model-00001-of-00001.safetensors (float16, 269 MB),
    model.safetensors.index.json, config.json {"model_type": "llama", "hidden_size": 576, ...}

Format: what transformers 5.17's from_pretrained reads; hf_config.py makes config.json. The values are those that
llama.cpp dequantizes, rounded to float16 as llama.cpp rounds them when it converts to F16; vectors stay float32 as
there. Not done here: the tokenizer. Rows are tokenized by llama.cpp.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sg_local.dimensions import Dimensions, read_dimensions
from sg_local.errors import InputError, SgLocalError
from sg_local.files import Faults, atomic_path, partial_directory, write_text
from sg_local.gguf_header import GgufHeader, TensorInfo, read_model_header, require_supported
from sg_local.gguf_io.hf_config import hf_config
from sg_local.gguf_io.tensors import (
    Floats,
    ModelTensor,
    in_threads,
    is_left_alone,
    model_tensors,
    row_blocks,
)

MAX_SHARD_BYTES = 1024**3
FLOAT16_MAX = 65504.0
FLOAT16_MIN_NORMAL = 2.0**-14


class BaseWeights:
    """The weights of a GGUF as a Hugging Face checkpoint has them, dequantized when they are read.

    Matrices are float16, or float32 if float16 would lose more than its rounding: a value over 65504, or a BF16 tensor
    with values under float16's normal range. Vectors are float32.
    """

    def __init__(self, gguf_path: Path) -> None:
        """Raises InputError if the file is no model of a supported architecture, or transformers cannot express it."""
        self._header = read_model_header(gguf_path)
        require_supported(self._header)
        self.config = checkpoint_config(self._header)
        expected = model_tensors(self._header, read_dimensions(self._header))
        pairs = [(tensor, expected.get(tensor.name)) for tensor in self._header.tensors]
        self._tensors = {wanted.hf: (tensor, wanted) for tensor, wanted in pairs if wanted and wanted.hf}

    def largest_bytes(self) -> dict[str, int]:
        """Hugging Face's name → the most bytes that its values may take, in the order of the file."""
        return {
            name: math.prod(wanted.shape) * (4 if tensor.type_name in ("F32", "BF16") else 2)
            for name, (tensor, wanted) in self._tensors.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """The values by Hugging Face's names, in its shapes and row order. Raises InputError if one is NaN."""
        names = list(names)
        return dict(zip(names, in_threads(self._read_one, 0, names), strict=True))

    def _read_one(self, name: str) -> npt.NDArray[Any]:
        return _weights(self._header, *self._tensors[name])


def write_base_weights(gguf_path: Path, out_dir: Path) -> None:
    """Writes the dequantized weights of a GGUF model as a checkpoint directory for AutoModelForCausalLM.

    A shard has at most 1 GiB, or one larger tensor; one shard is in memory at a time. The directory is written as
    `.<name>.partial` beside `out_dir` and renamed at the end. A partial directory of a killed call is replaced, so only
    one process at a time may write an `out_dir`.

    Raises:
        InputError: the file is no model of a supported architecture, transformers cannot express it (all reasons,
            a line each), it holds NaN, or `out_dir` exists already.
        SgLocalError: the directory could not be written.
    """
    if out_dir.exists():
        raise InputError(f"{out_dir} exists already: remove it, or give another directory")
    weights = BaseWeights(gguf_path)
    partial = partial_directory(out_dir)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        _write_shards(weights, partial)
        write_text(partial / "config.json", json.dumps(weights.config, indent=2) + "\n")
        partial.rename(out_dir)
    except OSError as error:
        raise SgLocalError(
            f"{out_dir} could not be written: {error.strerror or error}: "
            "check the path and the disk's free space and permissions"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checkpoint_config(header: GgufHeader) -> dict[str, object]:
    """config.json of the checkpoint; of the weights only the factors of the rotation are read.

    Raises InputError with all reasons why the model cannot be a checkpoint, a line each.
    """
    dimensions = read_dimensions(header)
    faults = Faults()

    def fault(reason: str) -> None:
        faults.add(f"{header.path}: {reason}")

    _check_tensors(header, dimensions, fault)
    config = hf_config(header, dimensions, fault)
    faults.raise_any()
    return config


def link_base_weights(gguf_path: Path, weights_dir: Path, out_dir: Path) -> None:
    """Makes a checkpoint directory of the safetensors in weights_dir and the configuration in the GGUF.

    The files are linked, not copied. Rope scaling and attention windows come from the GGUF, not from weights_dir:
    llama.cpp, which serves the model, reads them there. Call `check_base_weights` before.
    """
    header = read_model_header(gguf_path)
    faults = Faults()
    config = hf_config(header, read_dimensions(header), lambda reason: faults.add(f"{gguf_path}: {reason}"))
    faults.raise_any()
    out_dir.mkdir(parents=True)
    for path in weights_dir.resolve().iterdir():
        if path.suffix == ".safetensors" or path.name == "model.safetensors.index.json":
            (out_dir / path.name).symlink_to(path)
    write_text(out_dir / "config.json", json.dumps(config, indent=2) + "\n")


def _check_tensors(header: GgufHeader, dimensions: Dimensions, fault: Callable[[str], None]) -> None:
    experts = header.metadata.get(f"{header.architecture}.expert_count", 0)
    if experts:
        fault(
            f"it is a mixture of {experts!r:.20} experts, which cannot be finetuned here; give a dense model"
        )
        return
    expected = model_tensors(header, dimensions)
    present = {tensor.name for tensor in header.tensors}
    groups = {expected[name].optional for name in present & expected.keys()}
    for name, wanted in expected.items():
        if name not in present and (not wanted.optional or wanted.optional in groups):
            fault(f"tensor {name} is missing; get another copy of the model")
    for tensor in header.tensors:
        if is_left_alone(tensor.name, dimensions):
            continue
        if tensor.name not in expected:
            fault(
                f"tensor {tensor.name!r} has no place in a {header.architecture} model of text; give another model"
            )
        elif (shape := tensor.shape[::-1]) != expected[tensor.name].shape:
            fault(
                f"tensor {tensor.name} has the shape {shape}, and the metadata says "
                f"{expected[tensor.name].shape}; get another copy of the model"
            )


def _write_shards(weights: BaseWeights, directory: Path) -> None:
    # Only finetuning has safetensors installed.
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    parts: list[list[str]] = [[]]
    part_bytes = 0
    for name, largest_bytes in weights.largest_bytes().items():
        if parts[-1] and part_bytes + largest_bytes > MAX_SHARD_BYTES:
            parts.append([])
            part_bytes = 0
        parts[-1].append(name)
        part_bytes += largest_bytes
    shards: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for number, names in enumerate(parts):
        path = directory / f"{number}.safetensors"
        arrays = weights.read(names)
        with atomic_path(path) as temporary:
            try:
                save_file(arrays, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise SgLocalError(
                    f"{directory} could not be written: {error}: free some space on this disk"
                ) from error
        shards.append((path, names))
        total_bytes += sum(array.nbytes for array in arrays.values())
        del arrays

    weight_map: dict[str, str] = {}
    for index, (path, tensor_names) in enumerate(shards, start=1):
        final = path.with_name(f"model-{index:05}-of-{len(shards):05}.safetensors")
        path.rename(final)
        weight_map |= dict.fromkeys(tensor_names, final.name)
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text(directory / "model.safetensors.index.json", json.dumps(index_json, indent=2) + "\n")


def _weights(header: GgufHeader, tensor: TensorInfo, wanted: ModelTensor) -> npt.NDArray[Any]:
    """The tensor in Hugging Face's shape and row order, float16 or float32, contiguous."""
    if len(wanted.shape) == 1:
        values = np.concatenate([block.ravel() for _, block in row_blocks(header, tensor)])
        vector: Floats = np.empty_like(values)
        vector[wanted.row_order] = wanted.hf_values(values)
        if np.isnan(vector).any():
            raise InputError(
                f"{header.path}: tensor {tensor.name} has values over 0, where there are none; get another copy of "
                "the model"
            )
        return vector
    order = wanted.row_order
    if wanted.is_kernel:  # a vector's size, and float32 as vectors are
        kernel: Floats = np.empty(wanted.shape, np.float32)
        kernel[order] = np.concatenate([block for _, block in row_blocks(header, tensor)])
        return kernel.reshape(wanted.hf_shape)
    columns = np.argsort(wanted.column_order) if wanted.value_heads else slice(None)
    matrix: npt.NDArray[Any] = np.empty(wanted.shape, np.float16)
    for start, block in row_blocks(header, tensor):
        if matrix.dtype == np.float16 and not _fits_float16(block, tensor.type_name):
            # This is rare, so earlier rows are read again and not kept in float32.
            matrix = np.empty(wanted.shape, np.float32)
            for first, earlier in row_blocks(header, tensor):
                matrix[order[first : first + len(earlier)]] = earlier[:, columns]
            break
        rows = slice(start, start + len(block))
        # Converted first: while it assigns by index, numpy converts three times as slowly.
        matrix[order[rows] if wanted.is_reordered else rows] = block.astype(matrix.dtype)[:, columns]
    return matrix


def _fits_float16(values: Floats, type_name: str) -> bool:
    sizes = np.abs(values)
    if sizes.max() > FLOAT16_MAX:
        return False
    return type_name != "BF16" or not bool(((sizes > 0) & (sizes < FLOAT16_MIN_NORMAL)).any())
