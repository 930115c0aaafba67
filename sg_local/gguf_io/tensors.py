"""The tensors of a GGUF model: their names in Hugging Face's models, shapes, row order and values.

    blk.0.attn_q.weight, (576, 576) Q4_1  →  model.layers.0.self_attn.q_proj.weight, (576, 576) float32,
    rows in the order rope_row_order(576, 9) = [0, 32, 1, 33, ..., 31, 63, 64, 96, ...]

Sources: architectures.py, and the gguf package for quantized blocks. Shapes here are (rows, columns); a GGUF stores
them in the reverse order.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from sg_local.architectures import ARCHITECTURES, TensorSpec
from sg_local.dimensions import Dimensions
from sg_local.errors import InputError
from sg_local.gguf_header import GgufHeader, TensorInfo

Floats: TypeAlias = npt.NDArray[np.float32]
Order: TypeAlias = npt.NDArray[np.intp]
Result = TypeVar("Result")

MAX_THREADS = 8  # that work on tensors: more wait for memory, and for Python between numpy's calls

# Of a block of rows. Dequantizing or adding needs several arrays of this size at once. They fit the processor's cache,
# which is twice as fast as blocks of 4 million.
BLOCK_ELEMENTS = 256 * 1024


def lora_targets(architecture: str) -> tuple[str, ...]:
    """The modules that get LoRA, by Hugging Face's names: all matrices of the layers."""
    return tuple(dict.fromkeys(matrix.module for matrix in ARCHITECTURES[architecture].matrices))


@dataclass(frozen=True)
class ModelTensor:
    """A tensor that a model of this architecture and these dimensions has, or may have."""

    hf: str  # its name in Hugging Face's model; "" if that has it in config.json
    shape: tuple[int, ...]  # (rows, columns), or (elements,)
    n_heads: int  # the heads by which its rows are permuted; 0: not permuted
    optional: str
    plus_one: bool  # see TensorSpec
    is_kernel: bool = False  # see TensorSpec
    value_heads: "ValueHeads | None" = None  # which of its rows or columns are value heads; None: none
    is_log: bool = False  # see TensorSpec

    @property
    def is_reordered(self) -> bool:
        """Whether the order of its rows or columns may be another one."""
        return bool(self.n_heads or self.value_heads)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Its shape in Hugging Face's model."""
        return (self.shape[0], 1, self.shape[1]) if self.is_kernel else self.shape

    @property
    def takes_lora(self) -> bool:
        """Whether it is a matrix of a layer; llama.cpp lets an adapter change only these."""
        return len(self.shape) == 2 and ".layers." in self.hf and not self.is_kernel

    @property
    def row_order(self) -> Order:
        """The order in which llama.cpp stores the rows, or elements: `gguf = hf[order]`, `hf[order] = gguf`."""
        if self.value_heads and self.value_heads.axis == 0:
            return value_head_order(self.shape[0], self.value_heads)
        return rope_row_order(self.shape[0], self.n_heads)

    @property
    def column_order(self) -> Order:
        """The order in which llama.cpp stores the columns of a matrix."""
        if self.value_heads and self.value_heads.axis == 1:
            return value_head_order(self.shape[1], self.value_heads)
        return np.arange(self.shape[1])

    def hf_values(self, values: Floats) -> Floats:
        """The values that Hugging Face has for these of the GGUF; NaN where there are none."""
        if self.is_log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(-values.astype(np.float64)).astype(np.float32)
        return values - 1 if self.plus_one else values

    def gguf_values(self, values: Floats) -> Floats:
        """The values that the GGUF has for these of Hugging Face."""
        if self.is_log:
            return -np.exp(values)
        return values + 1 if self.plus_one else values


class ValueHeads(NamedTuple):
    """The rows or columns of a tensor that are value heads of linear attention, at its end."""

    axis: int
    n_key_heads: int
    n_value_heads: int
    width: int  # rows or columns of a head


def model_tensors(header: GgufHeader, dimensions: Dimensions) -> dict[str, ModelTensor]:
    """GGUF name → tensor, for all tensors that a model of this architecture may have."""

    def sized(spec: TensorSpec, hf_prefix: str) -> ModelTensor:
        return ModelTensor(
            hf=hf_prefix + spec.hf if spec.hf else "",
            shape=dimensions.sizes(spec.shape),
            n_heads=getattr(dimensions, spec.heads) if spec.heads else 0,
            optional=spec.optional,
            plus_one=spec.plus_one,
            is_kernel=spec.is_kernel,
            value_heads=_value_heads(spec, dimensions),
            is_log=spec.is_log,
        )

    architecture = ARCHITECTURES[header.architecture]
    of_layers = {
        f"blk.{layer}.{spec.gguf}": sized(spec, f"model.layers.{layer}.")
        for layer, kind in enumerate(dimensions.kinds)
        for spec in architecture.tensors_of(kind)
    }
    return {spec.gguf: sized(spec, "") for spec in architecture.tensors} | of_layers


def is_left_alone(name: str, dimensions: Dimensions) -> bool:
    """Whether a tensor is of a layer behind the model's own, for speculative decoding: it stays as it is."""
    block = re.match(r"blk\.(\d{1,6})\.", name)
    return block is not None and 0 <= int(block[1]) - dimensions.n_layers < dimensions.n_prediction_layers


def _value_heads(spec: TensorSpec, dimensions: Dimensions) -> ValueHeads | None:
    if not spec.value_heads:
        return None
    axis = ("rows", "columns").index(spec.value_heads)
    width = 1 if spec.shape[axis] == "n_value_heads" else dimensions.linear_head_dim
    return ValueHeads(axis, dimensions.n_key_heads, dimensions.n_value_heads, width)


def value_head_order(size: int, heads: ValueHeads) -> Order:
    """The order in which llama.cpp stores `size` rows or columns that end with value heads: `gguf = hf[order]`.

    Hugging Face has the value heads of a key head one after the other; llama.cpp the first of each key head, then the
    second of each, as it repeats the key heads.
    """
    order = np.arange(size)
    first = size - heads.n_value_heads * heads.width
    of_key_heads = order[first:].reshape(heads.n_key_heads, -1, heads.width)
    return np.concatenate([order[:first], of_key_heads.swapaxes(0, 1).reshape(-1)])


def rope_row_order(n_rows: int, n_heads: int) -> Order:
    """The order in which llama.cpp stores the rows of q and k: `gguf = hf[order]`, `hf[order] = gguf`.

    Hugging Face rotates row i of a head with row i + head_dim/2, llama.cpp rotates 2i with 2i + 1. n_heads 0: the
    order of the rows is the same.
    """
    order = np.arange(n_rows)
    return order.reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(-1) if n_heads else order


def in_threads(work: Callable[..., Result], n_threads: int, *arguments: Iterable[Any]) -> Iterator[Result]:
    """`map(work, *arguments)` by several threads, results in order; numpy computes without Python's lock.

    n_threads: 0 for one on each processor that this process may use. The first error ends it, in the order of the
    arguments; what was not begun then is left.
    """
    if not n_threads:
        can_tell = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
        n_threads = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1
    pool = ThreadPoolExecutor(min(n_threads, MAX_THREADS))
    try:
        yield from pool.map(work, *arguments)
    finally:
        pool.shutdown(cancel_futures=True)


def byte_rows(header: GgufHeader, tensor: TensorInfo) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The tensor as it is stored, a block of whole rows at a time: (first row, array (rows, row_bytes)).

    A vector is one row. Raises InputError if the file cannot be read.
    """
    if not tensor.size_bytes:
        return
    n_rows = math.prod(tensor.shape[1:])
    row_bytes = tensor.size_bytes // n_rows
    step = max(1, BLOCK_ELEMENTS // tensor.shape[0])
    for start in range(0, n_rows, step):
        count = min(step, n_rows - start)
        data = read_bytes(header, tensor.offset_bytes + start * row_bytes, count * row_bytes)
        yield start, data.reshape(count, row_bytes)


def row_blocks(header: GgufHeader, tensor: TensorInfo) -> Iterator[tuple[int, Floats]]:
    """The tensor's values as float32, a block of whole rows at a time: (first row, array (rows, columns)).

    The caller may change the arrays.
    Raises InputError if the file cannot be read, the type cannot be dequantized, or a value is NaN or infinite.
    """
    for start, data in byte_rows(header, tensor):
        values = _dequantize(header, tensor, data)
        if not np.isfinite(values).all():
            raise not_finite(header, tensor)
        yield start, values


def not_finite(header: GgufHeader, tensor: TensorInfo) -> InputError:
    """The error to raise for a tensor with NaN or infinite values or scales."""
    return InputError(
        f"{header.path} has NaN or infinite values in tensor {tensor.name}; get another copy of the model"
    )


def read_bytes(header: GgufHeader, offset_bytes: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes of the file. Raises InputError if the file became shorter since its header was checked."""
    try:
        data = np.fromfile(header.path, np.uint8, size_bytes, offset=offset_bytes)
    except OSError as error:
        raise InputError(f"{header.path} cannot be read: {error.strerror or error}") from error
    if len(data) != size_bytes:
        raise InputError(f"{header.path} became shorter while it was read; leave it alone and run again")
    return data


def quantization(type_name: str) -> Any:
    """The gguf package's constant of a tensor type. Raises InputError if the package is too old to have it."""
    try:
        return gguf.GGMLQuantizationType[type_name]
    except KeyError as error:
        raise InputError(
            f"tensors of the type {type_name} are unknown to the installed gguf package: update it, "
            "or give another quantization of the model"
        ) from error


def not_dequantizable(header: GgufHeader, tensor: TensorInfo) -> InputError | None:
    """The error of a tensor whose type cannot be read here, to be raised; None where it can. Nothing is read."""
    try:
        _, block_bytes = gguf.GGML_QUANT_SIZES[quantization(tensor.type_name)]
        _dequantize(header, tensor, np.zeros((1, int(block_bytes)), np.uint8))
    except InputError as error:
        return error
    return None


def _dequantize(header: GgufHeader, tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> Floats:
    if tensor.type_name == "F32":
        return data.view(np.float32)
    try:
        # A damaged block may hold anything; the caller checks for NaN and infinity.
        with np.errstate(all="ignore"):
            values: Floats = gguf.quants.dequantize(data, quantization(tensor.type_name))
    except NotImplementedError as error:
        raise InputError(
            f"{header.path} has tensor {tensor.name} in the type {tensor.type_name}, which cannot be "
            "dequantized here; give another quantization of the model, such as Q4_K_M or Q8_0"
        ) from error
    return values
