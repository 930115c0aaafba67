"""The weights of a llama GGUF as a Hugging Face checkpoint, so that what is trained is what is served.

    SmolLM2-135M-Instruct.Q4_1.gguf, 98 MB → model-00001-of-00001.safetensors (float16, 269 MB),
    model.safetensors.index.json, config.json {"model_type": "llama", "hidden_size": 576, ...}

Format: what transformers 5.17's LlamaConfig and from_pretrained read. Values are llama.cpp's dequantized
ones, rounded to float16 as llama.cpp rounds them when it requantizes to F16; vectors stay float32 as there.
Not done here: the tokenizer. Rows are tokenized by llama.cpp.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import GgufHeader, TensorInfo, read_model_header, require_supported
from sg_local.gguf_io.tensors import (
    Dimensions,
    Floats,
    ModelTensor,
    model_tensors,
    read_dimensions,
    rope_row_order,
    row_blocks,
)
from sg_local.records import Faults, atomic_path, write_text

MAX_SHARD_BYTES = 1024**3
FLOAT16_MAX = 65504.0
FLOAT16_MIN_NORMAL = 2.0**-14

ROPE_FREQS = "rope_freqs.weight"


def write_base_weights(gguf_path: Path, out_dir: Path) -> None:
    """Writes the dequantized weights of a llama GGUF as a checkpoint directory for LlamaForCausalLM.

    Shards of at most 1 GiB, or one larger tensor; one shard is in memory at a time. Matrices are float16, or
    float32 where float16 would lose more than its rounding: a value over 65504, or a BF16 tensor with values
    under float16's normal range. The directory is written as `.<name>.partial` beside `out_dir` and renamed
    at the end; what a killed call left there is replaced, so one process at a time may write an `out_dir`.

    Raises:
        InputError: the file is no llama model, transformers' Llama cannot express it (all reasons, a line
            each), it holds NaN, or `out_dir` exists already.
        SgLocalError: the directory could not be written.
    """
    if out_dir.exists():
        raise InputError(f"{out_dir} exists already: remove it, or give another directory")
    header = read_model_header(gguf_path)
    require_supported(header)
    dimensions = read_dimensions(header)
    expected = model_tensors(header, dimensions)
    faults = Faults()

    def fault(reason: str) -> None:
        faults.add(f"{gguf_path}: {reason}")

    _check_tensors(header, expected, fault)
    config = _config(header, dimensions, fault)
    faults.raise_any()

    partial = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        _write_shards(header, expected, partial)
        write_text(partial / "config.json", json.dumps(config, indent=2) + "\n")
        partial.rename(out_dir)
    except OSError as error:
        raise SgLocalError(
            f"{out_dir} could not be written: {error.strerror or error}: "
            "check the path and the disk's free space and permissions"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_tensors(
    header: GgufHeader, expected: dict[str, ModelTensor], fault: Callable[[str], None]
) -> None:
    experts = header.metadata.get(f"{header.architecture}.expert_count", 0)
    if experts:
        fault(
            f"it is a mixture of {experts!r:.20} experts, which cannot be finetuned here; give a dense model"
        )
        return
    present = {tensor.name for tensor in header.tensors}
    groups = {expected[name].optional for name in present & expected.keys()}
    for name, wanted in expected.items():
        if name not in present and (not wanted.optional or wanted.optional in groups):
            fault(f"tensor {name} is missing; get another copy of the model")
    for tensor in header.tensors:
        if tensor.name == ROPE_FREQS:
            continue
        if tensor.name not in expected:
            fault(f"tensor {tensor.name!r} has no place in a Llama model; give another model")
        elif (shape := tensor.shape[::-1]) != expected[tensor.name].shape:
            fault(
                f"tensor {tensor.name} has the shape {shape}, and the metadata says "
                f"{expected[tensor.name].shape}; get another copy of the model"
            )


def _config(header: GgufHeader, dimensions: Dimensions, fault: Callable[[str], None]) -> dict[str, Any]:
    """config.json as transformers 5.17 reads it; what it cannot express goes to `fault`."""
    metadata, prefix = header.metadata, header.architecture
    present = {tensor.name for tensor in header.tensors}

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < dimensions.vocab else None

    if dimensions.hidden % dimensions.n_heads:
        fault(
            f"an embedding of {dimensions.hidden} is not a multiple of {dimensions.n_heads} heads, which "
            "transformers refuses; give another model"
        )
    context_length = metadata.get(f"{prefix}.context_length")
    if not isinstance(context_length, int) or context_length <= 0:
        fault(f"{prefix}.context_length is {context_length!r:.40}, not a positive integer")
    rms_norm_eps = metadata.get(f"{prefix}.attention.layer_norm_rms_epsilon")
    if not isinstance(rms_norm_eps, float) or not 0 < rms_norm_eps < 1:
        fault(f"{prefix}.attention.layer_norm_rms_epsilon is {rms_norm_eps!r:.40}, not a small number")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": dimensions.vocab,
        "hidden_size": dimensions.hidden,
        "intermediate_size": dimensions.intermediate,
        "num_hidden_layers": dimensions.n_layers,
        "num_attention_heads": dimensions.n_heads,
        "num_key_value_heads": dimensions.n_kv_heads,
        "head_dim": dimensions.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": _shortest(rms_norm_eps),
        "rope_parameters": _rope_parameters(header, dimensions, fault),
        "attention_bias": "blk.0.attn_q.bias" in present,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in present,
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
    }


def _rope_parameters(
    header: GgufHeader, dimensions: Dimensions, fault: Callable[[str], None]
) -> dict[str, Any]:
    metadata, prefix = header.metadata, f"{header.architecture}.rope"
    theta = metadata.get(f"{prefix}.freq_base", 10000.0)
    if not isinstance(theta, float) or not 1 < theta < 1e12:
        fault(f"{prefix}.freq_base is {theta!r:.40}, not a number over 1")
        theta = 10000.0
    rotated = metadata.get(f"{prefix}.dimension_count", dimensions.head_dim)
    if rotated != dimensions.head_dim:
        fault(
            f"it rotates {rotated!r:.40} of {dimensions.head_dim} dimensions of a head, which Llama cannot "
            "express; give another model"
        )
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": _shortest(theta)}

    # llama.cpp takes a factor without a type as linear; 0 means that there is none.
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor", 0.0) or metadata.get(f"{prefix}.scale_linear", 0.0)
    if kind not in ("none", "linear"):
        fault(f"{prefix}.scaling.type is {kind!r:.40}, which cannot be converted; give a model without it")
    elif not isinstance(factor, float) or not 0 <= factor < 1e6:
        fault(f"{prefix}.scaling.factor is {factor!r:.40}, not a number that scales")
    elif kind == "linear" and factor not in (0.0, 1.0):
        parameters |= {"rope_type": "linear", "factor": _shortest(factor)}

    freqs = header.tensor(ROPE_FREQS)
    if freqs is None:
        return parameters
    if freqs.shape != (dimensions.head_dim // 2,) or freqs.type_name != "F32":
        fault(f"tensor {ROPE_FREQS} is not {dimensions.head_dim // 2} numbers; get another copy")
        return parameters
    divisors = np.concatenate([block.ravel() for _, block in row_blocks(header, freqs)])
    if np.array_equal(divisors, np.ones_like(divisors)):
        return parameters
    # The file holds the divisors that Llama 3.1's rule gave, not the rule. All released models that have them
    # use these three numbers; only the factor, the divisor of the longest waves, differs (8 or 32).
    llama3 = {
        "rope_type": "llama3",
        "factor": _shortest(float(divisors[-1])),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if parameters["rope_type"] != "default" or not np.allclose(
        divisors, _llama3_divisors(theta, dimensions.head_dim, llama3), rtol=1e-4
    ):
        fault(
            f"tensor {ROPE_FREQS} does not follow the rule of Llama 3.1, which transformers could express; "
            "give another model"
        )
    return parameters | llama3


def _llama3_divisors(theta: float, head_dim: int, parameters: dict[str, Any]) -> npt.NDArray[np.float64]:
    """What Llama 3.1's rule divides each of the head_dim/2 rotation frequencies by."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = (parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = parameters["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def _shortest(number: Any) -> Any:
    """A float32 from the file as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number))) if isinstance(number, float) else number


def _write_shards(header: GgufHeader, expected: dict[str, ModelTensor], directory: Path) -> None:
    shards: list[tuple[Path, list[str]]] = []
    arrays: dict[str, npt.NDArray[Any]] = {}
    total_bytes = 0

    def write_shard() -> None:
        # Only finetuning has safetensors installed.
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = directory / f"{len(shards)}.safetensors"
        with atomic_path(path) as temporary:
            try:
                save_file(arrays, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise SgLocalError(
                    f"{directory} could not be written: {error}: free some space on this disk"
                ) from error
        shards.append((path, list(arrays)))
        arrays.clear()

    for tensor in header.tensors:
        if tensor.name == ROPE_FREQS:
            continue
        wanted = expected[tensor.name]
        coming_bytes = math.prod(wanted.shape) * (4 if tensor.type_name in ("F32", "BF16") else 2)
        if arrays and sum(array.nbytes for array in arrays.values()) + coming_bytes > MAX_SHARD_BYTES:
            write_shard()
        arrays[wanted.hf] = _weights(header, tensor, wanted)
        total_bytes += arrays[wanted.hf].nbytes
    write_shard()

    weight_map: dict[str, str] = {}
    for index, (path, names) in enumerate(shards, start=1):
        final = path.with_name(f"model-{index:05}-of-{len(shards):05}.safetensors")
        path.rename(final)
        weight_map |= dict.fromkeys(names, final.name)
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_text(directory / "model.safetensors.index.json", json.dumps(index_json, indent=2) + "\n")


def _weights(header: GgufHeader, tensor: TensorInfo, wanted: ModelTensor) -> npt.NDArray[Any]:
    """The tensor in Hugging Face's shape and row order, float16 or float32, contiguous."""
    if len(wanted.shape) == 1:
        values = np.concatenate([block.ravel() for _, block in row_blocks(header, tensor)])
        vector: Floats = np.empty_like(values)
        vector[rope_row_order(len(values), wanted.n_heads)] = values
        return vector
    order = rope_row_order(wanted.shape[0], wanted.n_heads)
    matrix: npt.NDArray[Any] = np.empty(wanted.shape, np.float16)
    for start, block in row_blocks(header, tensor):
        if matrix.dtype == np.float16 and not _fits_float16(block, tensor.type_name):
            # Rare, so the rows before are read again rather than kept in float32.
            matrix = np.empty(wanted.shape, np.float32)
            for first, earlier in row_blocks(header, tensor):
                matrix[order[first : first + len(earlier)]] = earlier
            break
        matrix[order[start : start + len(block)]] = block
    return matrix


def _fits_float16(values: Floats, type_name: str) -> bool:
    sizes = np.abs(values)
    if sizes.max() > FLOAT16_MAX:
        return False
    return type_name != "BF16" or not bool(((sizes > 0) & (sizes < FLOAT16_MIN_NORMAL)).any())
