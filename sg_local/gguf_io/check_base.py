"""Whether a base can go through a whole run, told from its header and the settings before anything is computed.

    require_base(header, settings)
    InputError: base.gguf: gemma3.rope.scaling.type is 'yarn', which cannot be converted; give a model without it
    types_to_try(header, settings)    ("Q8_0",) for a base in Q3_K with --quant auto

A run makes data for hours before it trains and exports. What these would refuse is refused here.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields

from sg_local.architectures import ARCHITECTURES
from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.gguf_header import GgufHeader, require_supported
from sg_local.gguf_io.base_weights import checkpoint_config
from sg_local.gguf_io.merge import unmergeable_types
from sg_local.gguf_io.tensors import lora_targets, not_dequantizable
from sg_local.settings import Settings

FINER = "Q8_0"  # of model.gguf, where the base's own types cannot hold what was trained
MIXED = "base+Q8_0"  # the base's types, and FINER for about half of the weights
_FINE_TYPES = ("F32", "F16", "BF16", "Q8_0")  # which `auto` does not leave
LEAST_N_CTX: int = next(item for item in fields(Settings) if item.name == "n_ctx").metadata["low"]


def require_base(header: GgufHeader, settings: Settings) -> None:
    """Checks that the model can be trained, exported and proved with these settings.

    Raises InputError with all that speaks against it, a line each.
    """
    require_supported(header)  # of another architecture nothing more can be told
    faults = Faults(n_shown=20)
    checks: tuple[Callable[[GgufHeader, Settings], object], ...] = (
        lambda header, _settings: checkpoint_config(header),
        _require_context,
        _require_readable_types,
        _require_target_modules,
        _require_mergeable_types,
    )
    for check in checks:
        try:
            check(header, settings)
        except InputError as error:
            for line in str(error).splitlines():
                faults.add(line)
    faults.raise_any()


def target_modules(header: GgufHeader, settings: Settings) -> tuple[str, ...]:
    """The matrices of a layer that get LoRA. Raises InputError for names that the model does not have."""
    possible = lora_targets(header.architecture)
    named = tuple(name.strip() for name in settings.target_modules.split(","))
    chosen = possible if named == ("all",) else named
    if unknown := [name for name in chosen if name not in possible]:
        raise InputError(
            f"target_modules = {settings.target_modules!r:.200} names {', '.join(map(repr, unknown)):.200}; "
            f"{header.path.name} has {', '.join(possible)}: start a run with these, or with all"
        )
    return chosen


def types_to_try(
    header: GgufHeader, settings: Settings, tensor_names: Iterable[str] | None = None
) -> tuple[str, ...]:
    """The types of model.gguf that an export tries, the coarsest first: the given one, or those of `auto`.

    `auto` begins with the base's own, or with Q8_0 where nothing can be merged in these. llama.cpp's types between are
    not among them: to round a base of 4 bits anew to 5 or 6 adds more noise than the merge on its own grid has.

    tensor_names: the base's tensors that the adapter changes; by default those that the settings give LoRA.
    """
    if settings.quant != "auto":
        return (settings.quant,)
    names = set(_tensors_with_lora(header, settings) if tensor_names is None else tensor_names)
    if unmergeable_types(header, names):
        return (FINER,)
    if not (coarse := _coarse(header, names)):
        return ("base",)
    finer = set(finer_types(header, names))
    return ("base", MIXED, FINER) if finer and finer != coarse else ("base", FINER)


def finer_types(header: GgufHeader, tensor_names: Iterable[str]) -> dict[str, str]:
    """Of the tensors that the adapter changes, those that get another type in MIXED: the attention's, and ffn_down.

    That is half of the weights, and most of what a merge loses. Measured on SmolLM2-135M in Q4_1: with the attention in
    Q8_0 the divergence from the trained model is half, with ffn_down too a quarter; ffn_down alone gains nothing.
    """
    names = sorted(_coarse(header, tensor_names))
    return {name: FINER for name in names if ".attn_" in name or ".ffn_down." in name}


def _coarse(header: GgufHeader, tensor_names: Iterable[str]) -> set[str]:
    """Those of the tensors whose type rounds much."""
    types = {tensor.name: tensor.type_name for tensor in header.tensors}
    return {name for name in tensor_names if types.get(name, "F32") not in _FINE_TYPES}


def about_merging(header: GgufHeader, settings: Settings) -> str | None:
    """What a user should know beforehand of the type of model.gguf; None where there is nothing to say."""
    types = unmergeable_types(header, _tensors_with_lora(header, settings))
    if settings.quant != "auto" or not types:
        return None
    return f"model.gguf will be in {FINER}: nothing can be merged in the base's type {', '.join(types)}"


def _tensors_with_lora(header: GgufHeader, settings: Settings) -> list[str]:
    """The tensors that a run with these settings trains an adapter for; none for unknown modules."""
    chosen = {name.strip() for name in settings.target_modules.split(",")}
    endings = {
        spec.gguf
        for spec in ARCHITECTURES[header.architecture].matrices
        if "all" in chosen or spec.module in chosen
    }
    return [
        tensor.name
        for tensor in header.tensors
        if tensor.name.startswith("blk.") and tensor.name.split(".", 2)[-1] in endings
    ]


def _require_context(header: GgufHeader, settings: Settings) -> None:
    """Raises InputError where llama.cpp in a context of n_ctx tokens does not compute what is trained.

    That is so where the model has rotation factors for long contexts (Phi 3 128k) and n_ctx is over its original
    context: llama.cpp takes them for every prompt, torch for long ones only.
    """
    original = header.metadata.get(f"{header.architecture}.rope.scaling.original_context_length")
    has_factors = header.tensor("rope_factors_long.weight") is not None
    if not has_factors or not isinstance(original, int) or settings.n_ctx <= original:
        return
    advice = f"take --n-ctx {original}" if original >= LEAST_N_CTX else "give another model"
    raise InputError(
        f"{header.path} has other rotation factors above {original} tokens, with which it could not be trained as "
        f"it is served; n_ctx is {settings.n_ctx}: {advice}"
    )


def _require_readable_types(header: GgufHeader, _settings: Settings) -> None:
    faults = Faults()
    first_of_type = {tensor.type_name: tensor for tensor in reversed(header.tensors)}
    for tensor in first_of_type.values():
        if error := not_dequantizable(header, tensor):
            faults.add(str(error))
    faults.raise_any()


def _require_target_modules(header: GgufHeader, settings: Settings) -> None:
    target_modules(header, settings)


def _require_mergeable_types(header: GgufHeader, settings: Settings) -> None:
    types = unmergeable_types(header, _tensors_with_lora(header, settings))
    if settings.quant == "base" and types:
        raise InputError(
            f"{header.path} has matrices of the type {', '.join(types)}, in which nothing can be merged: "
            f"take --quant {FINER}, or auto, which does so by itself"
        )
