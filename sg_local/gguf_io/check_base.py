"""Whether a base can go through a whole run, told from its header and the settings before anything is computed.

    require_base(header, settings)
    InputError: base.gguf: gemma3.rope.scaling.type is 'yarn', which cannot be converted; give a model without it
    type_to_merge_in(header, settings)    "Q8_0" for a base in Q3_K with --quant auto

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


def type_to_merge_in(
    header: GgufHeader, settings: Settings, tensor_names: Iterable[str] | None = None
) -> str:
    """The --quant that `auto` begins with: base, or Q8_0 where the base's types cannot be merged; else the given one.

    tensor_names: the base's tensors that the adapter changes; by default those that the settings give LoRA.
    """
    if settings.quant != "auto":
        return settings.quant
    names = _tensors_with_lora(header, settings) if tensor_names is None else tensor_names
    return FINER if unmergeable_types(header, names) else "base"


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
