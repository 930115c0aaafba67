"""The tensors of a GGUF model: their names and shapes in Hugging Face's words, their row order, their values.

    blk.0.attn_q.weight, (576, 576) Q4_1  →  model.layers.0.self_attn.q_proj.weight, (576, 576) float32,
    rows in the order rope_row_order(576, 9) = [0, 32, 1, 33, ..., 31, 63, 64, 96, ...]

Names, row order and values: llama.cpp's conversion (conversion/llama.py: function permute; qwen.py; gemma.py:
norm_shift; phi.py) and its src/models/*.cpp; quantized blocks: the gguf package. Shapes here are (rows, columns), the
reverse of the GGUF's own order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt

from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.gguf_header import GgufHeader, TensorInfo
from sg_local.gguf_values import MetadataValue

Floats: TypeAlias = npt.NDArray[np.float32]

# A block of rows: dequantizing it, or adding to it, takes several arrays of this many numbers at once. They stay
# in the processor's cache, which is twice as fast as blocks of 4 million.
BLOCK_ELEMENTS = 256 * 1024


class TensorName(NamedTuple):
    """One tensor of an architecture: its two names, and its shape in fields of Dimensions."""

    gguf: str
    hf: str  # "" for what Hugging Face has in config.json
    shape: tuple[str, ...]
    heads: str = ""  # the field of Dimensions that counts the heads by which llama.cpp permutes the rows
    optional: str = ""  # all tensors of a model that have the same word here are there, or none
    plus_one: bool = False  # the GGUF has the value that is multiplied with, Hugging Face that minus one


class TensorNames(NamedTuple):
    """The tensors of an architecture; those of layer n are called blk.n.… and model.layers.n.…"""

    of_model: tuple[TensorName, ...]
    of_layer: tuple[TensorName, ...]


_BIAS = "attention_bias"
_LONGROPE = "rope_factors"

_OF_MODEL = (
    TensorName("token_embd.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
    TensorName("output_norm.weight", "model.norm.weight", ("hidden",)),
    TensorName("output.weight", "lm_head.weight", ("vocab", "hidden"), optional="lm_head"),
)
_NORMS = (
    TensorName("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
    TensorName("ffn_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
)
_ATTENTION = (
    TensorName("attn_q.weight", "self_attn.q_proj.weight", ("q_rows", "hidden")),
    TensorName("attn_k.weight", "self_attn.k_proj.weight", ("kv_rows", "hidden")),
    TensorName("attn_v.weight", "self_attn.v_proj.weight", ("kv_rows", "hidden")),
    TensorName("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q_rows")),
)
_HEAD_NORMS = (
    TensorName("attn_q_norm.weight", "self_attn.q_norm.weight", ("head_dim",)),
    TensorName("attn_k_norm.weight", "self_attn.k_norm.weight", ("head_dim",)),
)
_MLP = (
    TensorName("ffn_gate.weight", "mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorName("ffn_up.weight", "mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorName("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "intermediate")),
)


def _plus_one(rows: tuple[TensorName, ...]) -> tuple[TensorName, ...]:
    return tuple(row._replace(plus_one=len(row.shape) == 1) for row in rows)


TENSOR_NAMES = {
    "llama": TensorNames(
        of_model=(*_OF_MODEL, TensorName("rope_freqs.weight", "", ("rope_pairs",), optional="rope_freqs")),
        of_layer=(
            *_NORMS,
            TensorName("attn_q.weight", "self_attn.q_proj.weight", ("q_rows", "hidden"), "n_heads"),
            TensorName("attn_k.weight", "self_attn.k_proj.weight", ("kv_rows", "hidden"), "n_kv_heads"),
            *_ATTENTION[2:],
            TensorName("attn_q.bias", "self_attn.q_proj.bias", ("q_rows",), "n_heads", _BIAS),
            TensorName("attn_k.bias", "self_attn.k_proj.bias", ("kv_rows",), "n_kv_heads", _BIAS),
            TensorName("attn_v.bias", "self_attn.v_proj.bias", ("kv_rows",), optional=_BIAS),
            TensorName("attn_output.bias", "self_attn.o_proj.bias", ("hidden",), optional=_BIAS),
            *_MLP,
        ),
    ),
    "qwen2": TensorNames(
        of_model=_OF_MODEL,
        of_layer=(
            *_NORMS,
            *_ATTENTION,
            TensorName("attn_q.bias", "self_attn.q_proj.bias", ("q_rows",)),
            TensorName("attn_k.bias", "self_attn.k_proj.bias", ("kv_rows",)),
            TensorName("attn_v.bias", "self_attn.v_proj.bias", ("kv_rows",)),
            *_MLP,
        ),
    ),
    "qwen3": TensorNames(of_model=_OF_MODEL, of_layer=(*_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP)),
    "gemma3": TensorNames(
        of_model=_plus_one(_OF_MODEL),
        of_layer=_plus_one(
            (
                TensorName("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
                # Llama's norm of that name comes before the MLP, this one before the residual is added.
                TensorName("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
                TensorName("ffn_norm.weight", "pre_feedforward_layernorm.weight", ("hidden",)),
                TensorName("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ("hidden",)),
                *_ATTENTION,
                *_HEAD_NORMS,
                *_MLP,
            )
        ),
    ),
    "phi3": TensorNames(
        of_model=(
            *_OF_MODEL,
            TensorName("rope_factors_long.weight", "", ("rope_pairs",), optional=_LONGROPE),
            TensorName("rope_factors_short.weight", "", ("rope_pairs",), optional=_LONGROPE),
        ),
        of_layer=(
            *_NORMS,
            TensorName("attn_qkv.weight", "self_attn.qkv_proj.weight", ("qkv_rows", "hidden")),
            TensorName("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q_rows")),
            TensorName("ffn_up.weight", "mlp.gate_up_proj.weight", ("gate_up_rows", "hidden")),
            TensorName("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "intermediate")),
        ),
    ),
}


def lora_targets(architecture: str) -> tuple[str, ...]:
    """The modules that a LoRA adapter trains, by Hugging Face's names: all matrices of a layer."""
    rows = TENSOR_NAMES[architecture].of_layer
    return tuple(row.hf.split(".")[-2] for row in rows if len(row.shape) == 2)


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model, from its metadata and its token embedding."""

    vocab: int  # rows of the token embedding
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rotated: int  # the first so many dimensions of a head are rotated by position

    @property
    def q_rows(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        return self.q_rows + 2 * self.kv_rows

    @property
    def gate_up_rows(self) -> int:
        return 2 * self.intermediate

    @property
    def rope_pairs(self) -> int:
        return self.n_rotated // 2


@dataclass(frozen=True)
class ModelTensor:
    """A tensor that a model of this architecture and these dimensions has, or may have."""

    hf: str  # "" for what Hugging Face has in config.json
    shape: tuple[int, ...]  # (rows, columns), or (elements,)
    n_heads: int  # its rows are permuted by so many heads; 0: they are not
    optional: str
    plus_one: bool  # see TensorName

    @property
    def takes_lora(self) -> bool:
        """Whether it is a matrix of a layer, which llama.cpp lets an adapter change."""
        return len(self.shape) == 2 and ".layers." in self.hf


def read_dimensions(header: GgufHeader) -> Dimensions:
    """The model's dimensions. The architecture has to be one of TENSOR_NAMES.

    Raises InputError, with all faults: a key is missing or no positive integer, layers differ in size,
    keys and values differ in length, or the numbers contradict each other.
    """
    faults = Faults()

    def fault(reason: str) -> None:
        faults.add(f"{header.path}: {reason}; give another conversion of the model")

    def size(key: str, default: int | None = None) -> int:
        name = f"{header.architecture}.{key}"
        value: MetadataValue | None = header.metadata.get(name, default)
        # Some converters write a number for each layer where one would do.
        if isinstance(value, list) and value and all(element == value[0] for element in value):
            value = value[0]
        if isinstance(value, list):
            fault(f"{name} differs between layers, which transformers cannot express")
        elif value is None:
            fault(f"{name} is missing")
        elif isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            fault(f"{name} is {value!r:.40}, not a positive integer")
        else:
            return value
        return 1

    embedding = header.tensor("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        fault("the matrix token_embd.weight is missing")
    hidden = size("embedding_length")
    n_heads = size("attention.head_count")
    head_dim = size("attention.key_length", max(1, hidden // n_heads))
    dimensions = Dimensions(
        vocab=embedding.shape[-1] if embedding else 1,
        hidden=hidden,
        intermediate=size("feed_forward_length"),
        n_layers=size("block_count"),
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        n_rotated=size("rope.dimension_count", head_dim),
    )
    if size("attention.value_length", head_dim) != head_dim:
        fault("its attention keys and values differ in length, which transformers cannot express")
    if n_heads % dimensions.n_kv_heads:
        fault(f"{n_heads} attention heads are not a multiple of {dimensions.n_kv_heads} KV heads")
    if head_dim % 2:
        fault(f"its attention heads have the odd size {head_dim}")
    # Each layer has tensors; this bounds the loops over layers.
    if dimensions.n_layers > len(header.tensors):
        fault(f"it has {len(header.tensors)} tensors for {dimensions.n_layers} layers")
    faults.raise_any()
    return dimensions


def model_tensors(header: GgufHeader, dimensions: Dimensions) -> dict[str, ModelTensor]:
    """GGUF name → tensor, for all that a model of this architecture may have."""

    def sized(row: TensorName, hf_prefix: str) -> ModelTensor:
        return ModelTensor(
            hf=hf_prefix + row.hf if row.hf else "",
            shape=tuple(getattr(dimensions, field) for field in row.shape),
            n_heads=getattr(dimensions, row.heads) if row.heads else 0,
            optional=row.optional,
            plus_one=row.plus_one,
        )

    names = TENSOR_NAMES[header.architecture]
    of_layers = {
        f"blk.{layer}.{row.gguf}": sized(row, f"model.layers.{layer}.")
        for layer in range(dimensions.n_layers)
        for row in names.of_layer
    }
    return {row.gguf: sized(row, "") for row in names.of_model} | of_layers


def rope_row_order(n_rows: int, n_heads: int) -> npt.NDArray[np.intp]:
    """The order in which llama.cpp stores the rows of q and k: `gguf = hf[order]`, `hf[order] = gguf`.

    Hugging Face rotates row i of a head with row i + head_dim/2, llama.cpp 2i with 2i + 1. With n_heads 0 the
    rows stay as they are.
    """
    order = np.arange(n_rows)
    return order.reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(-1) if n_heads else order


def byte_rows(header: GgufHeader, tensor: TensorInfo) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The tensor as it is stored, a block of whole rows at a time: (first row, array (rows, row_bytes)).

    A vector is one row. Raises InputError where the file cannot be read.
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

    The arrays are the caller's to change.
    Raises InputError where the file cannot be read, the type cannot be dequantized, or a value is NaN or infinite.
    """
    for start, data in byte_rows(header, tensor):
        values = _dequantize(header, tensor, data)
        if not np.isfinite(values).all():
            raise not_finite(header, tensor)
        yield start, values


def not_finite(header: GgufHeader, tensor: TensorInfo) -> InputError:
    """The error of a tensor with NaN or infinite values or scales, to be raised."""
    return InputError(
        f"{header.path} has NaN or infinite values in tensor {tensor.name}; get another copy of the model"
    )


def read_bytes(header: GgufHeader, offset_bytes: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Bytes of the file. Raises InputError where it has changed since its header was checked."""
    try:
        data = np.fromfile(header.path, np.uint8, size_bytes, offset=offset_bytes)
    except OSError as error:
        raise InputError(f"{header.path} cannot be read: {error.strerror or error}") from error
    if len(data) != size_bytes:
        raise InputError(f"{header.path} became shorter while it was read; leave it alone and run again")
    return data


def quantization(type_name: str) -> Any:
    """The gguf package's constant of a tensor type. Raises InputError where it is too old to have it."""
    try:
        return gguf.GGMLQuantizationType[type_name]
    except KeyError as error:
        raise InputError(
            f"tensors of the type {type_name} are unknown to the installed gguf package: update it, "
            "or give another quantization of the model"
        ) from error


def _dequantize(header: GgufHeader, tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> Floats:
    if tensor.type_name == "F32":
        return data.view(np.float32)
    try:
        # A damaged block may hold anything; NaN and infinities are looked for afterwards.
        with np.errstate(all="ignore"):
            values: Floats = gguf.quants.dequantize(data, quantization(tensor.type_name))
    except NotImplementedError as error:
        raise InputError(
            f"{header.path} has tensor {tensor.name} in the type {tensor.type_name}, which cannot be "
            "dequantized here; give another quantization of the model, such as Q4_K_M or Q8_0"
        ) from error
    return values
