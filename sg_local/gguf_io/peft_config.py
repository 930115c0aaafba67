"""adapter_config.json of a LoRA adapter, which may be a stranger's: what of it an adapter.gguf can express.

    {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_dora": false, ...}
    → AdapterConfig(alpha=32.0, rank=16, targets={"q_proj", "v_proj"}, excluded=set(), layers=None, ...)

Format: peft.LoraConfig (https://huggingface.co/docs/peft). PEFT itself never gets to see the file: the proof gives it
`peft_fields`, which are made from what was checked here. So nothing in it can make PEFT run a regular expression, or
compute something else than what is exported.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from sg_local.errors import InputError
from sg_local.files import Faults, JsonObject, read_json

MAX_CONFIG_BYTES = 1024**2
MAX_RANK = 65_536
MIN_ALPHA = 1e-6  # far below it a float32 is 0, which llama.cpp takes for scale 1
MAX_ALPHA = 1e9
MAX_NAMES = 10_000
MAX_NAME_CHARS = 256

# Fields that make the adapter more than W + alpha/rank · B · A, unless they are empty.
_MUST_BE_EMPTY = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "auto_map",  # names code to run, as trust_remote_code does
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "trust_remote_code",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
    }
)
# Fields that say how the adapter began, was trained or is to be loaded, and not what it computes.
_OF_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",  # of modules_to_save
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",  # read where there is a megatron_config
        "peft_version",
        "qalora_group_size",  # read where use_qalora is true
        "revision",
        "runtime_config",
        "task_type",
    }
)
_READ_HERE = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
    }
)
# The other initializations (pissa, olora, corda, loftq, ...) also change the base that the adapter is for.
_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_ALL_MATRICES = "all-linear"
# PEFT takes a name in a pattern for a regular expression. With letters and points alone it takes no time to speak of.
_PLAIN_NAME = re.compile(rf"[\w.]{{1,{MAX_NAME_CHARS}}}")


@dataclass(frozen=True)
class AdapterConfig:
    """What a checked adapter_config.json says. Names are of modules, whole or their last parts: "q_proj"."""

    alpha: float
    rank: int
    targets: frozenset[str] | None  # None: all matrices
    excluded: frozenset[str]
    layers: frozenset[int] | None  # None: all layers
    begins_at_zero: bool  # so that a matrix without stored values changes nothing
    # of modules that differ from alpha and rank: by whole names or their last parts, the first that fits
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """The rank of a module's two matrices."""
        return self.rank_pattern.get(_first_fitting(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """What a module's change is multiplied with, times its rank."""
        return self.alpha_pattern.get(_first_fitting(self.alpha_pattern, module), self.alpha)

    def applies_to(self, module: str, stored_as: str = "") -> bool:
        """Whether PEFT adapts a module by these fields: "model.layers.0.self_attn.q_proj".

        stored_as: the name that it has in the adapter, if that is another.
        """
        names = _endings(module) | _endings(stored_as or module)
        if not self.excluded.isdisjoint(names):
            return False
        if self.targets is None:
            return True
        return not self.targets.isdisjoint(names) and (
            self.layers is None or _layer_of(module) in self.layers
        )


def read_fields(path: Path) -> JsonObject:
    """adapter_config.json as it is. Raises InputError where it cannot be read or is no JSON object."""
    config = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; give a directory that PEFT saved")
    return config


def checked_config(
    path: Path, config: JsonObject, stored_modules: Collection[str], faults: Faults
) -> AdapterConfig:
    """What the fields of the file at `path` say; adds what is wrong with them to `faults`, and reads it as 1 or as all.

    stored_modules: those that the adapter has values for, to be named where the file does not say it in a usable way.
    """
    if config.get("peft_type") != "LORA":
        faults.add(f"{path}: peft_type is {config.get('peft_type')!r:.40}; only LORA can be exported")
    for key in sorted(_MUST_BE_EMPTY & config.keys()):
        if config[key]:
            faults.add(
                f"{path}: {key} is {config[key]!r:.80}, which llama.cpp's adapters cannot express; train without it"
            )
    for key, value in config.items():
        if value and key not in _MUST_BE_EMPTY | _OF_NO_EFFECT | _READ_HERE:
            faults.add(
                f"{path}: {key!r:.60} is {value!r:.80}, a field that is unknown here and may change what the adapter "
                "computes; train without it, or take it out where it changes nothing"
            )
    if config.get("bias", "none") != "none":
        faults.add(f"{path}: bias is {config['bias']!r:.40}; train with bias 'none'")
    initialization = config.get("init_lora_weights", True)
    if not any(initialization is known or initialization == known for known in _INITIALIZATIONS):
        faults.add(
            f"{path}: init_lora_weights is {initialization!r:.40}, which changes the base weights too; train with true"
        )
    alpha, rank = _alpha_and_rank(path, config, faults)
    return AdapterConfig(
        alpha,
        rank,
        _targets(path, config.get("target_modules"), stored_modules, faults),
        _excluded(path, config.get("exclude_modules"), faults),
        _layers(path, config, faults),
        begins_at_zero=initialization not in (None, False, "orthogonal"),
        rank_pattern={
            name: rank
            for name, rank in _pattern(path, config, "rank_pattern", faults).items()
            if _is_rank(rank, path, f"rank_pattern[{name!r:.80}]", faults)
        },
        alpha_pattern={
            name: float(alpha)
            for name, alpha in _pattern(path, config, "alpha_pattern", faults).items()
            if _is_alpha(alpha, path, f"alpha_pattern[{name!r:.80}]", faults)
        },
    )


def peft_fields(config: AdapterConfig, modules: Mapping[str, str]) -> dict[str, object]:
    """The fields of peft.LoraConfig for an adapter of these modules, written from nothing but what was checked.

    modules: the name in transformers' model → the name in the adapter's file.
    """
    ranks = {module: config.rank_of(stored_as) for module, stored_as in sorted(modules.items())}
    alphas = {module: config.alpha_of(stored_as) for module, stored_as in sorted(modules.items())}
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != config.alpha},
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def _alpha_and_rank(path: Path, config: Mapping[str, object], faults: Faults) -> tuple[float, int]:
    """lora_alpha and r, 1 where they are faulty."""
    alpha, rank = config.get("lora_alpha"), config.get("r")
    return (
        float(alpha) if _is_alpha(alpha, path, "lora_alpha", faults) else 1.0,
        rank if _is_rank(rank, path, "r", faults) else 1,
    )


def _is_alpha(alpha: object, path: Path, key: str, faults: Faults) -> TypeGuard[int | float]:
    if not isinstance(alpha, bool) and isinstance(alpha, int | float) and MIN_ALPHA <= alpha <= MAX_ALPHA:
        return True
    faults.add(f"{path}: {key} is {alpha!r:.40}, not a number over 0, from {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    return False


def _is_rank(rank: object, path: Path, key: str, faults: Faults) -> TypeGuard[int]:
    if not isinstance(rank, bool) and isinstance(rank, int) and 1 <= rank <= MAX_RANK:
        return True
    faults.add(f"{path}: {key} is {rank!r:.40}, not a positive integer up to {MAX_RANK}")
    return False


def _pattern(path: Path, config: Mapping[str, object], key: str, faults: Faults) -> dict[str, object]:
    """The entries of rank_pattern or alpha_pattern, whose keys PEFT takes for regular expressions."""
    value = config.get(key)
    if not value:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        faults.add(f"{path}: {key} is {value!r:.80}, no object of names; train without it")
        return {}
    for name in value:
        if not _PLAIN_NAME.fullmatch(name):
            faults.add(
                f"{path}: {key} has {name!r:.80}, a regular expression, which is not run here; write the modules' names"
            )
    return {name: entry for name, entry in value.items() if _PLAIN_NAME.fullmatch(name)}


def _first_fitting(names: Iterable[str], module: str) -> str:
    """The first of the names that is the module's or its last part, as PEFT looks for it; "" if none is."""
    return next((name for name in names if re.fullmatch(rf"(.*\.)?({name})", module)), "")


def _targets(
    path: Path, value: object, stored_modules: Collection[str], faults: Faults
) -> frozenset[str] | None:
    """The names in target_modules; None stands for all matrices, and for what is faulty."""
    if isinstance(value, str) and value.lower() == _ALL_MATRICES:
        return None
    names = _names(value)
    if names:
        return names
    kind = "a regular expression, which is not run here" if isinstance(value, str) else "no list of names"
    trained = sorted({module.rpartition(".")[2] for module in stored_modules})[:20]
    faults.add(
        f"{path}: target_modules is {value!r:.80}, {kind}; write the names of the matrices that were trained"
        + (f": {', '.join(trained):.300}" if trained else "")
    )
    return None


def _excluded(path: Path, value: object, faults: Faults) -> frozenset[str]:
    if not value:
        return frozenset()
    names = _names(value)
    if names is None:
        kind = "a regular expression, which is not run here" if isinstance(value, str) else "no list of names"
        faults.add(
            f"{path}: exclude_modules is {value!r:.80}, {kind}; write the names, or take it out and "
            "name in target_modules what was trained"
        )
    return names or frozenset()


def _layers(path: Path, config: Mapping[str, object], faults: Faults) -> frozenset[int] | None:
    """The numbers in layers_to_transform; None stands for all layers, and for what is faulty."""
    pattern, value = config.get("layers_pattern"), config.get("layers_to_transform")
    if pattern and pattern not in ("layers", ["layers"]):  # PEFT takes it for a regular expression
        faults.add(
            f"{path}: layers_pattern is {pattern!r:.80}, a regular expression, which is not run here; "
            'take it out, or write "layers"'
        )
    if value is None or value == []:
        return None
    numbers = [value] if type(value) is int else value
    if (
        isinstance(numbers, list)
        and len(numbers) <= MAX_NAMES
        and all(type(number) is int for number in numbers)
    ):
        return frozenset(numbers)
    faults.add(
        f"{path}: layers_to_transform is {value!r:.80}, no list of layers' numbers; write them as [0, 1]"
    )
    return None


def _names(value: object) -> frozenset[str] | None:
    """A list of names; None where it is none, or over a bound."""
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        return None
    if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS for name in value):
        return None
    return frozenset(value)


def _endings(module: str) -> set[str]:
    """A module's name and its last parts, by any of which PEFT finds it: a.b.c → a.b.c, b.c, c."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _layer_of(module: str) -> int | None:
    """The first number in a module's name, as PEFT reads it."""
    return next((int(part) for part in module.split(".")[2:] if part.isdecimal()), None)
