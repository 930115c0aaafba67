"""Makes config.json from a GGUF's metadata, so that transformers computes what llama.cpp computes.

    gemma3.attention.sliding_window 512, gemma3.block_count 18 → {"model_type": "gemma3_text", "sliding_window": 512,
    "layer_types": ["sliding_attention", ... five times, "full_attention", ...], ...}

architectures.py lists the keys of an architecture; the values that have to be computed are computed here.
Sources: the configuration classes of transformers 5.17, and how llama.cpp's src/models/*.cpp use the metadata. If the
original config.json and llama.cpp differ, llama.cpp decides, since it serves the model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, NotRequired, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from sg_local.architectures import ARCHITECTURES, Computed, ConfigValue, HasTensor
from sg_local.dimensions import Dimensions
from sg_local.gguf_header import GgufHeader
from sg_local.gguf_io.tensors import row_blocks

Fault: TypeAlias = Callable[[str], None]


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


_DAMAGED = "; give another conversion of the model"  # a value that no model has

# llama.cpp scales attention differently in models with these numbers of layers.
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62

_EPS_OF_LINEAR_ATTENTION = 1e-6  # transformers' l2norm


def hf_config(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    """config.json as transformers 5.17 reads it. `fault` gets a reason for each thing that it cannot express."""
    metadata, prefix = header.metadata, header.architecture
    architecture = ARCHITECTURES[header.architecture]

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < dimensions.vocab else None

    wants_whole_heads = architecture.derives_heads or header.architecture in ("gemma2", "gemma3")
    if dimensions.hidden % dimensions.n_heads and wants_whole_heads:
        fault(
            f"an embedding of {dimensions.hidden} is not a multiple of {dimensions.n_heads} heads, which "
            "transformers refuses; give another model"
        )
    context_length = metadata.get(f"{prefix}.context_length")
    if not isinstance(context_length, int) or context_length <= 0:
        fault(f"{prefix}.context_length is {context_length!r:.40}, not a positive integer{_DAMAGED}")
    rms_norm_eps = metadata.get(f"{prefix}.attention.layer_norm_rms_epsilon")
    if not isinstance(rms_norm_eps, float) or not 0 < rms_norm_eps < 1:
        fault(
            f"{prefix}.attention.layer_norm_rms_epsilon is {rms_norm_eps!r:.40}, not a small number{_DAMAGED}"
        )
        rms_norm_eps = 1e-5
    computed = _COMPUTED_KEYS.get(header.architecture, _rotation_alone)(header, dimensions, fault)

    def value(key: str, stated: ConfigValue) -> object:
        match stated:
            case HasTensor(name):
                return header.tensor(name) is not None
            case Computed():
                return computed[key]
            case _:
                return stated

    config = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": "float16",
        "vocab_size": dimensions.vocab,
        "hidden_size": dimensions.hidden,
        "intermediate_size": dimensions.intermediate,
        "num_hidden_layers": dimensions.n_layers,
        "num_attention_heads": dimensions.n_heads,
        "num_key_value_heads": dimensions.n_kv_heads,
        "head_dim": dimensions.head_dim,
        "max_position_embeddings": context_length,
        "rms_norm_eps": _shortest(rms_norm_eps),
        "tie_word_embeddings": header.tensor("output.weight") is None,
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
        **{key: value(key, stated) for key, stated in architecture.config.items()},
    }
    return {architecture.renamed.get(key, key): value for key, value in config.items()}


def _rotation_alone(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    rope = _rope(header, dimensions, fault, yarn=Yarn())
    if any(spec.gguf == "rope_freqs.weight" for spec in ARCHITECTURES[header.architecture].tensors):
        rope = _llama3_rope(header, dimensions, rope, fault)
    return {"rope_parameters": rope}


def _gemma2(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    def cap(key: str, default: float) -> float:
        value = header.metadata.get(f"gemma2.{key}", default)
        if not isinstance(value, float) or not 0 < value < 1e6:
            fault(f"gemma2.{key} is {value!r:.40}, not a number that caps{_DAMAGED}")
            return default
        return _shortest(value)

    window = _window(header, 4096, fault)
    if not window:
        fault(f"gemma2.attention.sliding_window is 0, with which no token would see one{_DAMAGED}")
    rope = _rope(header, dimensions, fault)
    key = "gemma2.rope.freq_base_swa"
    if key in header.metadata and (local_theta := _theta(header, key, fault)) != rope["rope_theta"]:
        fault(f"{key} is {local_theta}, and Gemma 2 in transformers has one base alone; give another model")
    return {
        "query_pre_attn_scalar": _attention_scale(dimensions, _GEMMA2_27B_LAYERS),
        "sliding_window": window,
        "layer_types": _layer_types(_local_layers(header, dimensions, 2, fault)),
        "rope_parameters": rope,
        "attn_logit_softcapping": cap("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": cap("final_logit_softcapping", 30.0),
    }


def _gemma3(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    metadata = header.metadata
    softcap = metadata.get("gemma3.final_logit_softcapping", 0.0)
    if softcap:
        fault(
            f"gemma3.final_logit_softcapping is {softcap!r:.40}: training with capped logits is not supported; "
            "give another model"
        )
    window = _window(header, 0, fault)
    is_local = _local_layers(header, dimensions, 6, fault) if window else [False] * dimensions.n_layers
    local_theta = _theta(header, "gemma3.rope.freq_base_swa", fault)
    return {
        "query_pre_attn_scalar": _attention_scale(dimensions, _GEMMA3_27B_LAYERS),
        # transformers wants a window even if no layer has one
        "sliding_window": window or metadata.get("gemma3.context_length"),
        "layer_types": _layer_types(is_local),
        "rope_parameters": {
            # only the global layers are scaled
            "full_attention": _rope(header, dimensions, fault),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        },
    }


def _attention_scale(dimensions: Dimensions, layers_of_27b: int) -> int:
    """What attention scores are divided by the root of: llama.cpp knows Gemma's 27B by its number of layers."""
    is_27b = dimensions.n_layers == layers_of_27b
    return dimensions.hidden // dimensions.n_heads if is_27b else dimensions.head_dim


def _window(header: GgufHeader, default: int, fault: Fault) -> int:
    key = f"{header.architecture}.attention.sliding_window"
    window = header.metadata.get(key, default)
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        fault(f"{key} is {window!r:.40}, not a number of tokens{_DAMAGED}")
        return default
    return window


def _layer_types(is_local: list[bool]) -> list[str]:
    return ["sliding_attention" if local else "full_attention" for local in is_local]


def _local_layers(header: GgufHeader, dimensions: Dimensions, default: int, fault: Fault) -> list[bool]:
    """Which layers have a window: all but every n-th, or those of a list in the metadata."""
    key = f"{header.architecture}.attention.sliding_window_pattern"
    pattern = header.metadata.get(key, default)
    if isinstance(pattern, list) and len(pattern) == dimensions.n_layers:
        return [bool(local) for local in pattern]
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 0:
        fault(
            f"{key} is {pattern!r:.40}, neither a number nor a list of {dimensions.n_layers} layers{_DAMAGED}"
        )
        pattern = 0
    return [not pattern or layer % pattern < pattern - 1 for layer in range(dimensions.n_layers)]


def _phi3(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    metadata = header.metadata
    context_length = metadata.get("phi3.context_length")
    original = _original_context(header, fault)
    share = _rotated_share(dimensions, fault)
    long, short = (
        _divisors(header, dimensions, f"rope_factors_{name}.weight", fault) for name in ("long", "short")
    )
    has_factors = long is not None and short is not None
    rope = _rope(header, dimensions, fault, partial=True, attn_factor=has_factors)
    if rope["rope_type"] != "default":
        fault(
            "phi3.rope.scaling.factor is given, which Phi 3 in transformers cannot express; give another model"
        )
    rope["partial_rotary_factor"] = share
    if long is not None and short is not None:
        # llama.cpp uses the long factors if its context is longer than the original one, transformers if the sequence
        # is. Up to the original context, both use the short ones.
        attention_factor = metadata.get("phi3.rope.scaling.attn_factor", 1.0)
        rope["rope_type"] = "longrope"
        rope["long_factor"] = [_shortest(float(number)) for number in long]
        rope["short_factor"] = [_shortest(float(number)) for number in short]
        rope["original_max_position_embeddings"] = original
        rope["attention_factor"] = attention_factor if isinstance(attention_factor, float) else 1.0
        if isinstance(context_length, int):
            rope["factor"] = max(1.0, context_length / original)
    return {"original_max_position_embeddings": original, "rope_parameters": rope}


def _granite(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    """Four scalars beside the rotation. llama.cpp takes 0 for "not scaled", and needs the logits' own."""
    metadata = header.metadata
    if metadata.get("granite.rope.scaling.finetuned", True) is False:
        fault(
            "granite.rope.scaling.finetuned is false: it rotates nothing, which transformers cannot express"
        )

    def scale(key: str, not_scaled: float) -> float:
        value = metadata.get(f"granite.{key}", 0.0)
        if not isinstance(value, float) or not 0 <= value < 1e6:
            fault(f"granite.{key} is {value!r:.40}, not a number that scales{_DAMAGED}")
            return not_scaled
        return _shortest(value) if value else not_scaled

    if "granite.logit_scale" not in metadata:
        fault(f"granite.logit_scale is missing{_DAMAGED}")
    return {
        **_rotation_alone(header, dimensions, fault),
        "embedding_multiplier": scale("embedding_scale", 1.0),
        "attention_multiplier": scale("attention.scale", dimensions.head_dim**-0.5),
        "residual_multiplier": scale("residual_scale", 1.0),
        "logits_scaling": scale("logit_scale", 1.0),  # transformers divides by it too
    }


def _smollm3(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    # llama.cpp rotates all but every fourth layer, and reads no key for it.
    return {
        **_rotation_alone(header, dimensions, fault),
        "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(dimensions.n_layers)],
    }


def _mistral3(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    """YaRN with the file's own numbers, and queries that grow with their position, as in Llama 4."""

    def number(key: str, default: float, least: float) -> float:
        value = header.metadata.get(f"mistral3.{key}", default)
        if not isinstance(value, float) or not least <= value < 1e6:
            fault(f"mistral3.{key} is {value!r:.40}, not a number from {least:g} on{_DAMAGED}")
            return default
        return _shortest(value)

    yarn = Yarn(
        number("rope.scaling.yarn_beta_fast", 32.0, 1e-6),
        number("rope.scaling.yarn_beta_slow", 1.0, 1e-6),
        number("rope.scaling.yarn_log_multiplier", 0.0, 0.0),
    )
    rope = _rope(header, dimensions, fault, yarn=yarn)
    rope["original_max_position_embeddings"] = _original_context(header, fault)
    rope["llama_4_scaling_beta"] = number("attention.temperature_scale", 0.0, 0.0)
    return {"rope_parameters": rope}


def _lfm2(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    window = header.metadata.get("lfm2.attention.sliding_window", 0)
    if window:
        fault(f"lfm2.attention.sliding_window is {window!r:.40}, which transformers cannot express")
    return {
        "rope_parameters": _rope(header, dimensions, fault),
        "layer_types": list(dimensions.layer_kinds),
        "conv_L_cache": dimensions.conv_tokens,
    }


def _qwen35(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    eps = header.metadata.get("qwen35.attention.layer_norm_rms_epsilon")
    if isinstance(eps, float) and _shortest(eps) != _EPS_OF_LINEAR_ATTENTION:
        fault(
            f"qwen35.attention.layer_norm_rms_epsilon is {_shortest(eps)}, with which llama.cpp norms queries and keys "
            f"of linear attention too, and transformers with {_EPS_OF_LINEAR_ATTENTION}; give another model"
        )
    key = "qwen35.rope.dimension_sections"
    sections = header.metadata.get(key)
    if not _rotates_all(sections, dimensions.rope_pairs):
        # llama.cpp rotates what is outside of them by a fourth position, which is 0 in text.
        fault(f"{key} is {sections!r:.40}, with which text is not rotated as transformers does{_DAMAGED}")
    rope = _rope(header, dimensions, fault, partial=True, yarn=Yarn())
    rope["partial_rotary_factor"] = _rotated_share(dimensions, fault)
    return {
        "rope_parameters": rope,
        "layer_types": list(dimensions.layer_kinds),
        "linear_conv_kernel_dim": dimensions.conv_tokens,
        "linear_key_head_dim": dimensions.linear_head_dim,
        "linear_value_head_dim": dimensions.linear_head_dim,
        "linear_num_key_heads": dimensions.n_key_heads,
        "linear_num_value_heads": dimensions.n_value_heads,
    }


def _rotates_all(sections: object, n_pairs: int) -> bool:
    """Whether llama.cpp's interleaved M-RoPE (ggml_mrope_cache_init) turns all pairs by one of the first 3 positions.

    These are equal in text, so that the sections do not matter otherwise.
    """
    if not isinstance(sections, list) or len(sections) != 4:
        return False
    sizes = [size for size in sections if isinstance(size, int) and not isinstance(size, bool) and size >= 0]
    if len(sizes) != 4 or not sum(sizes):
        return False
    places = {pair % sum(sizes) for pair in range(min(n_pairs, sum(sizes)))}
    return all(place < 3 * sizes[place % 3] for place in places)


# architecture → the function that computes its keys of config.json, if there are more than the rotation
_COMPUTED_KEYS: dict[str, Callable[[GgufHeader, Dimensions, Fault], dict[str, object]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "granite": _granite,
    "lfm2": _lfm2,
    "mistral3": _mistral3,
    "phi3": _phi3,
    "qwen35": _qwen35,
    "smollm3": _smollm3,
}


def _rotated_share(dimensions: Dimensions, fault: Fault) -> float:
    """The share of a head's dimensions that are rotated, as transformers wants it."""
    share = dimensions.n_rotated / dimensions.head_dim
    if share > 1 or dimensions.n_rotated % 2 or int(dimensions.head_dim * share) != dimensions.n_rotated:
        fault(
            f"it rotates {dimensions.n_rotated} of {dimensions.head_dim} dimensions of a head, which transformers "
            "cannot express; give another model"
        )
    return share


def _rope(
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
        "rope_theta": _theta(header, f"{prefix}.freq_base", fault),
    }

    # For llama.cpp, a factor without a type is linear, and 0 means no factor.
    kind = metadata.get(f"{prefix}.scaling.type", "linear")
    factor = metadata.get(f"{prefix}.scaling.factor", 0.0) or metadata.get(f"{prefix}.scale_linear", 0.0)
    attention_factor = metadata.get(f"{prefix}.scaling.attn_factor", 1.0)
    if not isinstance(attention_factor, float) or not 0 < attention_factor < 1e6:
        fault(f"{prefix}.scaling.attn_factor is {attention_factor!r:.40}, not a number over 0{_DAMAGED}")
        attention_factor = 1.0
    if kind not in ("none", "linear") and not (kind == "yarn" and yarn):
        fault(f"{prefix}.scaling.type is {kind!r:.40}, which cannot be converted; give a model without it")
        return parameters
    if not isinstance(factor, float) or not 0 <= factor < 1e6:
        fault(f"{prefix}.scaling.factor is {factor!r:.40}, not a number that scales{_DAMAGED}")
        return parameters
    if kind == "linear" and factor not in (0.0, 1.0):
        parameters["rope_type"], parameters["factor"] = "linear", _shortest(factor)
    if kind == "yarn" and yarn and factor not in (0.0, 1.0):
        return _yarn_rope(header, dimensions, parameters, yarn, _shortest(factor), attention_factor, fault)
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
    original = _original_context(header, fault)

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
        "attention_factor": _shortest(of_yarn * attention_factor),
    }


def _original_context(header: GgufHeader, fault: Fault) -> int:
    """Tokens of the context before it was extended; the whole one where the file does not say it."""
    key = f"{header.architecture}.rope.scaling.original_context_length"
    original = header.metadata.get(key, header.metadata.get(f"{header.architecture}.context_length"))
    if isinstance(original, bool) or not isinstance(original, int) or original <= 0:
        fault(f"{key} is {original!r:.40}, not a positive integer{_DAMAGED}")
        return 1
    return original


def _theta(header: GgufHeader, key: str, fault: Fault) -> float:
    theta = header.metadata.get(key, 10000.0)
    if not isinstance(theta, float) or not 1 < theta < 1e12:
        fault(f"{key} is {theta!r:.40}, not a number over 1{_DAMAGED}")
        return 10000.0
    return _shortest(theta)


def _divisors(
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


def _llama3_rope(
    header: GgufHeader, dimensions: Dimensions, parameters: RopeParameters, fault: Fault
) -> RopeParameters:
    divisors = _divisors(header, dimensions, "rope_freqs.weight", fault)
    if divisors is None or len(divisors) != dimensions.head_dim // 2 or np.all(divisors == 1):
        return parameters
    # The file holds the results of Llama 3.1's rule, not the rule. All released models with such a tensor have these
    # three numbers; only the factor, which divides the longest waves, differs (8 or 32).
    llama3: RopeParameters = {
        "rope_type": "llama3",
        "rope_theta": parameters["rope_theta"],
        "factor": _shortest(float(divisors[-1])),
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


def _shortest(number: float) -> float:
    """The shortest decimal for a float32 of the file: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))
