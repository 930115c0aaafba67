"""How a model rotates queries and keys by position: rope_parameters of config.json, made from a GGUF's metadata.

    qwen2.rope.scaling.type "yarn", factor 4.0, ... -> {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, ...}

Sources: transformers 5.17's modeling_rope_utils.py; llama.cpp's src/llama-context.cpp and ggml_rope_multi.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from sg_local.architectures import ARCHITECTURES
from sg_local.dimensions import Dimensions
from sg_local.gguf_header import GgufHeader
from sg_local.gguf_io.tensors import row_blocks

Fault: TypeAlias = Callable[[str], None]

DAMAGED = "; give another conversion of the model"  # a value that no model has


class RopeParameters(TypedDict):
    """rope_parameters of config.json: how queries and keys are rotated."""

    rope_type: str
    rope_theta: float
    factor: NotRequired[float]
    partial_rotary_factor: NotRequired[float]  # share of a head's dimensions
    low_freq_factor: NotRequired[float]
    high_freq_factor: NotRequired[float]
    original_max_position_embeddings: NotRequired[int]
    long_factor: NotRequired[list[float]]
    short_factor: NotRequired[list[float]]
    attention_factor: NotRequired[float]
    beta_fast: NotRequired[float]
    beta_slow: NotRequired[float]
    llama_4_scaling_beta: NotRequired[float]


class Yarn(NamedTuple):
    """What YaRN (arXiv 2309.00071) is computed with; of a file llama.cpp reads these for a few architectures only."""

    beta_fast: float = 32.0  # turns in the original context, from which on a frequency stays as it is
    beta_slow: float = 1.0  # turns up to which it is divided by the factor
    log_multiplier: float = 0.0  # mscale_all_dim; 0: not given


def rotated_share(dimensions: Dimensions, fault: Fault) -> float:
    """The share of a head's dimensions that are rotated, as transformers wants it."""
    share = dimensions.n_rotated / dimensions.head_dim
    if share > 1 or dimensions.n_rotated % 2 or int(dimensions.head_dim * share) != dimensions.n_rotated:
        fault(
            f"it rotates {dimensions.n_rotated} of {dimensions.head_dim} dimensions of a head, which transformers "
            "cannot express; give another model"
        )
    return share


def rope_parameters(
    header: GgufHeader,
    dimensions: Dimensions,
    fault: Fault,
    *,
    partial: bool = False,
    attn_factor: bool = False,
    yarn: Yarn | None = None,
) -> RopeParameters:
    """Rotation with or without scaling. partial, attn_factor: the caller handles these. yarn: None refuses it."""
    metadata, prefix = header.metadata, f"{header.architecture}.rope"
    if dimensions.n_rotated != dimensions.head_dim and not partial:
        fault(
            f"it rotates {dimensions.n_rotated} of {dimensions.head_dim} dimensions of a head, which "
            f"{ARCHITECTURES[header.architecture].class_name} cannot express; give another model"
        )
    parameters: RopeParameters = {
        "rope_type": "default",
        "rope_theta": rope_theta(header, f"{prefix}.freq_base", fault),
    }

    # For llama.cpp, a factor without a type is linear, and 0 means no factor.
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor", 0.0) or metadata.get(f"{prefix}.scale_linear", 0.0)
    attention_factor = metadata.get(f"{prefix}.scaling.attn_factor", 1.0)
    if not isinstance(attention_factor, float) or not 0 < attention_factor < 1e6:
        fault(f"{prefix}.scaling.attn_factor is {attention_factor!r:.40}, not a number over 0{DAMAGED}")
        attention_factor = 1.0
    if kind not in ("none", "linear") and not (kind == "yarn" and yarn):
        fault(f"{prefix}.scaling.type is {kind!r:.40}, which cannot be converted; give a model without it")
        return parameters
    if not isinstance(factor, float) or not 0 <= factor < 1e6:
        fault(f"{prefix}.scaling.factor is {factor!r:.40}, not a number that scales{DAMAGED}")
        return parameters
    if kind == "linear" and factor not in (0.0, 1.0):
        parameters["rope_type"], parameters["factor"] = "linear", shortest(factor)
    if kind == "yarn" and yarn and factor not in (0.0, 1.0):
        return _yarn_rope(header, dimensions, parameters, yarn, shortest(factor), attention_factor, fault)
    if attention_factor != 1.0 and not attn_factor:
        fault(
            f"{prefix}.scaling.attn_factor is {attention_factor}, which transformers cannot express without "
            "long and short factors or YaRN; give another model"
        )
    return parameters


def _yarn_rope(
    header: GgufHeader,
    dimensions: Dimensions,
    parameters: RopeParameters,
    yarn: Yarn,
    factor: float,
    attention_factor: float,
    fault: Fault,
) -> RopeParameters:
    """YaRN as llama.cpp's src/llama-context.cpp and ggml_rope_yarn_corr_dims compute it.

    attention_factor: the file's own, by which llama.cpp multiplies YaRN's.
    """
    prefix = f"{header.architecture}.rope.scaling"
    if factor < 1:
        fault(f"{prefix}.factor is {factor}, and YaRN is for contexts that grow; give another model")
        return parameters
    original = original_context(header, fault)

    def dimension(turns: float) -> float:
        """The rotated dimension of a head that turns so often in the original context."""
        base = math.log(parameters["rope_theta"])
        return dimensions.n_rotated * math.log(original / (turns * 2 * math.pi)) / (2 * base)

    first = max(0, math.floor(dimension(yarn.beta_fast)))
    last = min(dimensions.n_rotated - 1, math.ceil(dimension(yarn.beta_slow)))
    if first > last:
        fault(
            f"{prefix}.type is yarn with an original context of {original} tokens and a rotation in which no dimension "
            "is between fast and slow, which llama.cpp and transformers compute differently; give another model"
        )

    def magnitude(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1

    of_yarn = magnitude(1.0) / (magnitude(yarn.log_multiplier) if yarn.log_multiplier else 1.0)
    return {
        **parameters,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "attention_factor": shortest(of_yarn * attention_factor),
    }


def original_context(header: GgufHeader, fault: Fault) -> int:
    """Tokens of the context before it was extended; the whole one where the file does not say it."""
    key = f"{header.architecture}.rope.scaling.original_context_length"
    original = header.metadata.get(key, header.metadata.get(f"{header.architecture}.context_length"))
    if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
        fault(f"{key} is {original!r:.40}, not a positive integer{DAMAGED}")
        return 1
    return original


def rope_theta(header: GgufHeader, key: str, fault: Fault) -> float:
    theta = header.metadata.get(key, 10000.0)
    if not isinstance(theta, float) or not 1 < theta < 1e12:
        fault(f"{key} is {theta!r:.40}, not a number over 1{DAMAGED}")
        return 10000.0
    return shortest(theta)


def rope_divisors(
    header: GgufHeader, dimensions: Dimensions, name: str, fault: Fault
) -> npt.NDArray[np.float32] | None:
    """The tensor whose numbers divide the rotation's frequencies; None if there is none of that size."""
    tensor = header.tensor(name)
    if tensor is None or math.prod(tensor.shape) != dimensions.rope_pairs:
        return None  # a wrong shape is a fault of its own
    if tensor.type_name != "F32":
        fault(f"tensor {name} is of type {tensor.type_name}, which llama.cpp cannot use; get another copy")
        return None
    return np.concatenate([block.ravel() for _, block in row_blocks(header, tensor)])


def llama3_rope(
    header: GgufHeader, dimensions: Dimensions, parameters: RopeParameters, fault: Fault
) -> RopeParameters:
    divisors = rope_divisors(header, dimensions, "rope_freqs.weight", fault)
    if divisors is None or len(divisors) != dimensions.head_dim // 2 or np.all(divisors == 1):
        return parameters
    # The file holds the results of Llama 3.1's rule, not the rule. All released models with such a tensor have these
    # three numbers; only the factor, which divides the longest waves, differs (8 or 32).
    llama3: RopeParameters = {
        "rope_type": "llama3",
        "rope_theta": parameters["rope_theta"],
        "factor": shortest(float(divisors[-1])),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = _llama3_divisors(llama3, dimensions.head_dim)
    if parameters["rope_type"] != "default" or not np.allclose(divisors, wanted, rtol=1e-4):
        fault(
            "tensor rope_freqs.weight does not follow the rule of Llama 3.1, which transformers could express; "
            "give another model"
        )
    return llama3


def _llama3_divisors(parameters: RopeParameters, head_dim: int) -> npt.NDArray[np.float64]:
    """What Llama 3.1's rule divides each of the head_dim/2 rotation frequencies by."""
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = parameters["low_freq_factor"], parameters["high_freq_factor"], parameters["factor"]
    turns = parameters["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def rotates_all(sections: object, n_pairs: int) -> bool:
    """Whether llama.cpp's interleaved M-RoPE (ggml_mrope_cache_init) turns all pairs by one of the first 3 positions.

    These are equal in text, so that the sections do not matter otherwise.
    """
    if not isinstance(sections, list) or len(sections) != 4:
        return False
    sizes = [size for size in sections if isinstance(size, int) and not isinstance(size, bool) and size >= 0]
    if len(sizes) != 4 or not sum(sizes):
        return False
    last = min(n_pairs, sum(sizes)) - 1
    # Each third pair is turned by the same position; the last one of them is the first that would be left out.
    return all(last - (last - kind) % 3 < 3 * sizes[kind] for kind in range(3))


def shortest(number: float) -> float:
    """The shortest decimal for a float32 of the file: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
