"""Checks, tensor by tensor, that a GGUF was made from the 16-bit weights in a directory.

    blk.0.attn_q.weight, Q4_K, and model.layers.0.self_attn.q_proj.weight, bfloat16
    → relative RMS difference 0.073 of at most 0.18: it fits. Another model's: 1.41

Format: https://github.com/huggingface/safetensors, one file or shards with an index. A block of rows is in memory at a
time. Pickles, remote code and quantized weights are refused.
Not done here: the rest of config.json. hf_config.py makes one from the GGUF.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sg_local.architectures import ARCHITECTURES
from sg_local.dimensions import Dimensions, read_dimensions
from sg_local.errors import InputError
from sg_local.files import Faults, read_json
from sg_local.gguf_header import GgufHeader, TensorInfo, read_model_header, require_supported
from sg_local.gguf_io.hf_config import hf_config
from sg_local.gguf_io.safetensors_file import StoredTensor, stored_tensors
from sg_local.gguf_io.tensors import (
    Floats,
    ModelTensor,
    is_left_alone,
    model_tensors,
    row_blocks,
)

MAX_JSON_BYTES = 64 * 1024**2

# Root mean square of the rounding, relative to that of the weights: normal random numbers, llama.cpp's quantization
# (tests/model/test_quantized_weights.py measures them). With types that lose more, models cannot be told apart.
RELATIVE_ERRORS = {
    "F32": 0.0,
    "F16": 0.00021,
    "BF16": 0.00166,
    "Q8_0": 0.0054,
    "Q6_K": 0.0178,
    "Q5_K": 0.0363,
    "Q5_1": 0.0380,
    "Q5_0": 0.0428,
    "Q4_K": 0.0716,
    "IQ4_NL": 0.0762,
    "IQ4_XS": 0.0768,
    "Q4_1": 0.0783,
    "Q4_0": 0.0860,
    "MXFP4": 0.1146,
    "Q3_K": 0.1509,
    "IQ3_S": 0.1663,
    "IQ3_XXS": 0.2133,
    "IQ2_S": 0.2654,
    "Q2_K": 0.2970,
    "IQ2_XS": 0.3001,
    "IQ2_XXS": 0.3438,
}
# A block loses most if one weight is far larger than the others: Q8_0 √(32/12)/127 = 0.013, Q4_0 √(32/12)/8 = 0.20; up
# to 2.4 times what normal numbers lose (measured in Gemma 3: 1.8). Another model of the same shapes differs by √2.
MARGIN = 2.5
_ARITHMETIC = 1e-6  # adding 1 to a norm in float32

_DTYPES = ("F32", "F16", "BF16")
_REMEDY = "give the weights that this GGUF was made from, or leave out --base-weights"
# keys of config.json that do not follow from the shapes of the tensors, or that make the clearest error
_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)

# What transformers would import, or fetch, in older versions also without asking (CVE-2026-4372).
_NAMES_CODE = (
    "auto_map",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
)


class Matched(NamedTuple):
    """The tensors of a GGUF, each with its name among the stored ones."""

    header: GgufHeader
    pairs: list[tuple[TensorInfo, ModelTensor, str]]
    stored_by_name: dict[str, StoredTensor]


def check_base_weights(gguf_path: Path, weights_dir: Path) -> None:
    """Checks that a directory of safetensors holds the weights that the GGUF was made from.

    Each tensor may differ by no more than the rounding to the GGUF's type. So the weights of another model are
    refused, but with a coarse GGUF, not those of a slightly finetuned one.

    Raises InputError, with all faults: the directory or a file cannot be read, config.json names another model or
    remote code, the weights are pickles, a tensor is missing, has no counterpart, has another shape or other values.
    """
    header, pairs, stored_by_name = match_base_weights(gguf_path, weights_dir)
    faults = Faults()
    for tensor, model_tensor, name in pairs:
        stored_tensor = stored_by_name[name]
        bound = (
            MARGIN * (RELATIVE_ERRORS[tensor.type_name] + RELATIVE_ERRORS[stored_tensor.dtype]) + _ARITHMETIC
        )
        difference = _relative_difference(header, tensor, model_tensor, stored_tensor)
        if not difference <= bound:  # also if it is NaN
            faults.add(
                f"{weights_dir}: tensor {name} differs from {tensor.name} of {gguf_path.name} by {difference:.3g} "
                f"(relative RMS), and {tensor.type_name} explains {bound:.2g}; {_REMEDY}"
            )
    faults.raise_any()


def match_base_weights(gguf_path: Path, weights_dir: Path) -> Matched:
    """What check_base_weights looks at before it reads the weights themselves: seconds, even for a large model.

    Raises InputError as it does.
    """
    header = read_model_header(gguf_path)
    require_supported(header)
    config = _read_config(weights_dir)
    faults = Faults()
    dimensions = read_dimensions(header)
    wanted = hf_config(header, dimensions, lambda reason: faults.add(f"{gguf_path}: {reason}"))
    faults.raise_any()
    is_tied = config.get("tie_word_embeddings", ARCHITECTURES[header.architecture].default_tied)
    _compare_config(weights_dir / "config.json", config, wanted, bool(is_tied), header, faults)
    faults.raise_any()

    stored_by_name = _stored_tensors(weights_dir)
    pairs = _pairs(header, dimensions, bool(is_tied), faults)
    for name in sorted(stored_by_name.keys() - {name for _, _, name in pairs}):
        # Old checkpoints hold this buffer, some tied ones this copy, some the layers that the GGUF may have behind the
        # others; transformers reads none of them.
        is_ignored = name.endswith(".rotary_emb.inv_freq") or (
            ARCHITECTURES[header.architecture].has_prediction_layers and name.startswith("mtp.")
        )
        if not is_ignored and not (name == "lm_head.weight" and is_tied):
            faults.add(
                f"{weights_dir}: tensor {name!r:.120} has no counterpart in {gguf_path.name}; {_REMEDY}"
            )
    for tensor, model_tensor, name in pairs:
        _check_kind(weights_dir, stored_by_name.get(name), tensor, model_tensor, name, faults)
    faults.raise_any()
    return Matched(header, pairs, stored_by_name)


def _read_config(weights_dir: Path) -> dict[str, object]:
    if not weights_dir.is_dir():
        raise InputError(f"{weights_dir} is no directory: give one with config.json and safetensors files")
    path = weights_dir / "config.json"
    config = read_json(path, MAX_JSON_BYTES)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: give a directory as Hugging Face has them")
    if named := [key for key in _NAMES_CODE if config.get(key)]:
        raise InputError(
            f"{path} has {named[0]}: the model brings code of its own, which is never run here; "
            "give a copy in the format of transformers' own class"
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{path} has quantization_config: its weights are quantized; give the 16-bit weights"
        )
    return config


def _compare_config(
    path: Path,
    config: Mapping[str, object],
    wanted: Mapping[str, object],
    is_tied: bool,
    header: GgufHeader,
    faults: Faults,
) -> None:
    name = header.path.name
    if config.get("model_type") != wanted["model_type"]:
        faults.add(
            f"{path}: model_type is {config.get('model_type')!r:.40}, and {name} needs {wanted['model_type']!r}; "
            + _REMEDY
        )
        return
    architecture = ARCHITECTURES[header.architecture]
    stated = dict(config)
    if architecture.derives_heads:
        heads, hidden = stated.get("num_attention_heads"), wanted["hidden_size"]
        if stated.get("num_key_value_heads") is None:
            stated["num_key_value_heads"] = heads
        if (
            stated.get("head_dim") is None
            and isinstance(heads, int)
            and isinstance(hidden, int)
            and heads > 0
        ):
            stated["head_dim"] = hidden // heads
    same_keys = [architecture.renamed.get(key, key) for key in _SAME_KEYS]
    for key in same_keys:
        if key in architecture.adjusted:
            continue
        if not _same_number(value := stated.get(key), wanted[key]):
            faults.add(f"{path}: {key} is {value!r:.40}, and {name} has {wanted[key]}; {_REMEDY}")
    theta, wanted_theta = _theta(config, architecture.default_theta), _theta(wanted, None)
    if not _same_number(theta, wanted_theta):
        faults.add(f"{path}: rope_theta is {theta!r:.40}, and {name} has {wanted_theta}; {_REMEDY}")
    if header.tensor("output.weight") is None and not is_tied:
        faults.add(
            f"{path}: tie_word_embeddings is false, and {name} has no output matrix of its own; {_REMEDY}"
        )


def _same_number(one: object, other: object) -> bool:
    """Whether both are numbers that are equal, apart from the rounding of a float32."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return bool(np.isclose(one, other, rtol=1e-6, atol=0))
    return False


def _theta(config: Mapping[str, object], default: object) -> object:
    """rope_theta, in transformers' old place or in its new one."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config.get("rope_theta", default)
    of_all_layers = parameters.get("full_attention")
    parameters = of_all_layers if isinstance(of_all_layers, dict) else parameters
    return parameters.get("rope_theta", config.get("rope_theta", default))


def _pairs(
    header: GgufHeader, dimensions: Dimensions, is_tied: bool, faults: Faults
) -> list[tuple[TensorInfo, ModelTensor, str]]:
    """Each tensor of the GGUF that Hugging Face has too, with its name there."""
    expected = model_tensors(header, dimensions)
    pairs = []
    for tensor in header.tensors:
        model_tensor = expected.get(tensor.name)
        if is_left_alone(tensor.name, dimensions):
            continue
        if model_tensor is None:
            faults.add(
                f"{header.path}: tensor {tensor.name!r} has no place in a {header.architecture} model of text"
            )
        elif model_tensor.hf:
            # A GGUF may repeat the embedding as the output matrix.
            is_repeated = model_tensor.hf == "lm_head.weight" and is_tied
            name = expected["token_embd.weight"].hf if is_repeated else model_tensor.hf
            pairs.append((tensor, model_tensor, name))
    return pairs


def _stored_tensors(weights_dir: Path) -> dict[str, StoredTensor]:
    """Name → stored tensor, for all tensors that transformers would read from the directory."""
    single, index = weights_dir / "model.safetensors", weights_dir / "model.safetensors.index.json"
    if single.exists():
        return stored_tensors(single)
    if not index.exists():
        pickles = sorted(
            path.name for ending in ("bin", "pt", "pth") for path in weights_dir.glob(f"*.{ending}")
        )
        if pickles:
            raise InputError(
                f"{weights_dir} has {pickles[0]}, a pickle, which can run code when it is read; "
                "give the model's safetensors"
            )
        raise InputError(
            f"{weights_dir} has neither {single.name} nor {index.name}: give a directory as Hugging Face has them"
        )
    listed = read_json(index, MAX_JSON_BYTES)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no weight_map of names: get another copy")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(weight_map.values())):
        # A shard has to stand beside its index, whatever the index says.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index} names {file!r:.80}, no safetensors file of this directory")
        shards[file] = stored_tensors(weights_dir / file)
    missing = [name for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise InputError(
            f"{index} names tensor {missing[0]!r:.120}, which its file does not have: get another copy"
        )
    return {name: shards[file][name] for name, file in weight_map.items()}


def _check_kind(
    weights_dir: Path,
    stored_tensor: StoredTensor | None,
    tensor: TensorInfo,
    model_tensor: ModelTensor,
    name: str,
    faults: Faults,
) -> None:
    if tensor.type_name not in RELATIVE_ERRORS:
        faults.add(
            f"{tensor.name} is of type {tensor.type_name}, with which no weights can be compared; leave "
            "the weights out, or give a finer quantization of the model"
        )
    elif stored_tensor is None:
        faults.add(f"{weights_dir}: tensor {name} is missing; {_REMEDY}")
    elif stored_tensor.dtype not in _DTYPES:
        faults.add(f"{weights_dir}: tensor {name} is of type {stored_tensor.dtype}; give 16-bit weights")
    elif stored_tensor.shape != model_tensor.hf_shape or model_tensor.shape != tensor.shape[::-1]:
        faults.add(
            f"{weights_dir}: tensor {name} has the shape {stored_tensor.shape}, and {tensor.name} of the GGUF has "
            f"{tensor.shape[::-1]}; {_REMEDY}"
        )


def _relative_difference(
    header: GgufHeader, tensor: TensorInfo, model_tensor: ModelTensor, stored_tensor: StoredTensor
) -> float:
    """Root mean square of the difference, relative to that of the 16-bit tensor."""
    squares = difference = 0.0
    with np.errstate(invalid="ignore"):  # NaN and infinite values end as NaN
        for values, block in _blocks(header, tensor, model_tensor, stored_tensor):
            squares += float(np.square(values, dtype=np.float64).sum())
            difference += float(np.square(values - block, dtype=np.float64).sum())
    if squares == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(np.sqrt(difference / squares))


def _blocks(
    header: GgufHeader, tensor: TensorInfo, model_tensor: ModelTensor, stored_tensor: StoredTensor
) -> Iterator[tuple[Floats, Floats]]:
    """The same rows of both tensors, block by block: the 16-bit one in the GGUF's row order, and the GGUF's."""
    is_vector = len(stored_tensor.shape) == 1
    order = model_tensor.row_order
    columns = model_tensor.column_order if model_tensor.value_heads and not is_vector else slice(None)
    for start, block in row_blocks(header, tensor):
        if is_vector:
            values = stored_tensor.values()[order][np.newaxis]
        else:
            rows = order[start : start + len(block)]
            first = int(rows.min())  # permuted rows stay within their head, and heads near each other
            values = stored_tensor.rows(first, int(rows.max()) + 1 - first)[rows - first].reshape(block.shape)
            values = values[:, columns]
        yield model_tensor.gguf_values(values), block
