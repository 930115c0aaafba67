"""Makes config.json from a GGUF's metadata, so that transformers computes what llama.cpp computes.

    gemma3.attention.sliding_window 512, gemma3.block_count 18 → {"model_type": "gemma3_text", "sliding_window": 512,
    "layer_types": ["sliding_attention", ... five times, "full_attention", ...], ...}

architectures.py lists the keys of an architecture; the values that have to be computed are computed here.
Sources: the configuration classes of transformers 5.17, and how llama.cpp's src/models/*.cpp use the metadata. If the
original config.json and llama.cpp differ, llama.cpp decides, since it serves the model.
"""

from collections.abc import Callable

from sg_local.architectures import ARCHITECTURES, Computed, ConfigValue, HasTensor
from sg_local.dimensions import Dimensions
from sg_local.gguf_header import GgufHeader
from sg_local.gguf_io.rotation import (
    DAMAGED,
    Fault,
    Yarn,
    llama3_rope,
    original_context,
    rope_divisors,
    rope_parameters,
    rope_theta,
    rotated_share,
    rotates_all,
    shortest,
)

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
        fault(f"{prefix}.context_length is {context_length!r:.40}, not a positive integer{DAMAGED}")
    rms_norm_eps = metadata.get(f"{prefix}.attention.layer_norm_rms_epsilon")
    if not isinstance(rms_norm_eps, float) or not 0 < rms_norm_eps < 1:
        fault(
            f"{prefix}.attention.layer_norm_rms_epsilon is {rms_norm_eps!r:.40}, not a small number{DAMAGED}"
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
        "rms_norm_eps": shortest(rms_norm_eps),
        "tie_word_embeddings": header.tensor("output.weight") is None,
        "bos_token_id": token_id("bos"),
        "eos_token_id": token_id("eos"),
        "pad_token_id": token_id("padding"),
        **{key: value(key, stated) for key, stated in architecture.config.items()},
    }
    return {architecture.renamed.get(key, key): value for key, value in config.items()}


def _rotation_alone(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    rope = rope_parameters(header, dimensions, fault, yarn=Yarn())
    if any(spec.gguf == "rope_freqs.weight" for spec in ARCHITECTURES[header.architecture].tensors):
        rope = llama3_rope(header, dimensions, rope, fault)
    return {"rope_parameters": rope}


def _gemma2(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    def cap(key: str, default: float) -> float:
        value = header.metadata.get(f"gemma2.{key}", default)
        if not isinstance(value, float) or not 0 < value < 1e6:
            fault(f"gemma2.{key} is {value!r:.40}, not a number that caps{DAMAGED}")
            return default
        return shortest(value)

    window = _window(header, 4096, fault)
    if not window:
        fault(f"gemma2.attention.sliding_window is 0, with which no token would see one{DAMAGED}")
    rope = rope_parameters(header, dimensions, fault)
    key = "gemma2.rope.freq_base_swa"
    if key in header.metadata and (local_theta := rope_theta(header, key, fault)) != rope["rope_theta"]:
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
    local_theta = rope_theta(header, "gemma3.rope.freq_base_swa", fault)
    return {
        "query_pre_attn_scalar": _attention_scale(dimensions, _GEMMA3_27B_LAYERS),
        # transformers wants a window even if no layer has one
        "sliding_window": window or metadata.get("gemma3.context_length"),
        "layer_types": _layer_types(is_local),
        "rope_parameters": {
            # only the global layers are scaled
            "full_attention": rope_parameters(header, dimensions, fault),
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
        fault(f"{key} is {window!r:.40}, not a number of tokens{DAMAGED}")
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
            f"{key} is {pattern!r:.40}, neither a number nor a list of {dimensions.n_layers} layers{DAMAGED}"
        )
        pattern = 0
    return [not pattern or layer % pattern < pattern - 1 for layer in range(dimensions.n_layers)]


def _phi3(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    metadata = header.metadata
    context_length = metadata.get("phi3.context_length")
    original = original_context(header, fault)
    share = rotated_share(dimensions, fault)
    long, short = (
        rope_divisors(header, dimensions, f"rope_factors_{name}.weight", fault) for name in ("long", "short")
    )
    has_factors = long is not None and short is not None
    rope = rope_parameters(header, dimensions, fault, partial=True, attn_factor=has_factors)
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
        rope["long_factor"] = [shortest(float(number)) for number in long]
        rope["short_factor"] = [shortest(float(number)) for number in short]
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
            fault(f"granite.{key} is {value!r:.40}, not a number that scales{DAMAGED}")
            return not_scaled
        return shortest(value) if value else not_scaled

    if "granite.logit_scale" not in metadata:
        fault(f"granite.logit_scale is missing{DAMAGED}")
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
            fault(f"mistral3.{key} is {value!r:.40}, not a number from {least:g} on{DAMAGED}")
            return default
        return shortest(value)

    yarn = Yarn(
        number("rope.scaling.yarn_beta_fast", 32.0, 1e-6),
        number("rope.scaling.yarn_beta_slow", 1.0, 1e-6),
        number("rope.scaling.yarn_log_multiplier", 0.0, 0.0),
    )
    rope = rope_parameters(header, dimensions, fault, yarn=yarn)
    rope["original_max_position_embeddings"] = original_context(header, fault)
    rope["llama_4_scaling_beta"] = number("attention.temperature_scale", 0.0, 0.0)
    return {"rope_parameters": rope}


def _lfm2(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    window = header.metadata.get("lfm2.attention.sliding_window", 0)
    if window:
        fault(f"lfm2.attention.sliding_window is {window!r:.40}, which transformers cannot express")
    return {
        "rope_parameters": rope_parameters(header, dimensions, fault),
        "layer_types": list(dimensions.layer_kinds),
        "conv_L_cache": dimensions.conv_tokens,
    }


def _qwen35(header: GgufHeader, dimensions: Dimensions, fault: Fault) -> dict[str, object]:
    eps = header.metadata.get("qwen35.attention.layer_norm_rms_epsilon")
    if isinstance(eps, float) and shortest(eps) != _EPS_OF_LINEAR_ATTENTION:
        fault(
            f"qwen35.attention.layer_norm_rms_epsilon is {shortest(eps)}, with which llama.cpp norms queries and keys "
            f"of linear attention too, and transformers with {_EPS_OF_LINEAR_ATTENTION}; give another model"
        )
    key = "qwen35.rope.dimension_sections"
    sections = header.metadata.get(key)
    if not rotates_all(sections, dimensions.rope_pairs):
        # llama.cpp rotates what is outside of them by a fourth position, which is 0 in text.
        fault(f"{key} is {sections!r:.40}, with which text is not rotated as transformers does{DAMAGED}")
    rope = rope_parameters(header, dimensions, fault, partial=True, yarn=Yarn())
    rope["partial_rotary_factor"] = rotated_share(dimensions, fault)
    return {
        "rope_parameters": rope,
        "layer_types": list(dimensions.layer_kinds),
        "linear_conv_kernel_dim": dimensions.conv_tokens,
        "linear_key_head_dim": dimensions.linear_head_dim,
        "linear_value_head_dim": dimensions.linear_head_dim,
        "linear_num_key_heads": dimensions.n_key_heads,
        "linear_num_value_heads": dimensions.n_value_heads,
    }


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
