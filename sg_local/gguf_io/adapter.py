"""LoRA adapters: from PEFT's directory to the GGUF adapter that llama.cpp applies, and from that file to arrays.

    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight, (576, 16)
    → blk.0.attn_q.weight.lora_b, (576, 16) float32, rows permuted as llama.cpp permutes those of q

Format: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp. Both sides add alpha/rank · B · A to
the weight. What llama.cpp would apply differently from PEFT, or not at all, is refused here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sg_local.dimensions import read_dimensions
from sg_local.errors import InputError
from sg_local.files import Faults, atomic_path
from sg_local.gguf_header import (
    DEFAULT_ALIGNMENT_BYTES,
    GgufHeader,
    read_header,
    read_model_header,
    require_supported,
)
from sg_local.gguf_io.layout import OutputTensor, float32_value, pad, string_value, write_header
from sg_local.gguf_io.peft_config import AdapterConfig, checked_config, peft_fields, read_fields
from sg_local.gguf_io.safetensors_file import DTYPES, StoredTensor, stored_tensors
from sg_local.gguf_io.tensors import (
    Floats,
    ModelTensor,
    model_tensors,
    row_blocks,
)
from sg_local.gguf_values import MetadataValue
from sg_local.progress import say

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_WEIGHTS_BYTES = 8 * 1024**3

_PEFT_NAME = re.compile(
    r"(?:_orig_mod\.)*(?:base_model\.model\.(?:_orig_mod\.)*)+"
    r"(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight"
)
# The text part of a model for images too, which is what its GGUF has: under both of transformers' names
_TEXT_PART = re.compile(r"(?<=^model\.)language_model\.|^language_model\.(?=model\.)")
_VOCABULARY = re.compile("embed_tokens|lm_head|lora_embedding")


@dataclass(frozen=True)
class Adapter:
    """A GGUF LoRA adapter: W + alpha/rank · b @ a for each base tensor W of shape (rows, columns).

    `tensors` maps the base tensor's name to (a, b), a of shape (rank, columns), b of shape (rows, rank), with
    rows in llama.cpp's order; each has its own rank. `metadata` is all of the file's.
    """

    alpha: float
    metadata: dict[str, MetadataValue]
    tensors: dict[str, tuple[Floats, Floats]]

    def scale_of(self, name: str) -> float:
        """alpha/rank of a base tensor."""
        return self.alpha / len(self.tensors[name][0])


def write_adapter_gguf(
    adapter_dir: Path, base_path: Path, out_path: Path, metadata: Mapping[str, str]
) -> None:
    """Writes a PEFT LoRA adapter as a GGUF adapter for the base model `base_path`.

    adapter_dir: adapter_config.json and adapter_model.safetensors. metadata: string keys to add.
    The file holds float32 tensors and the keys general.type, adapter.type, adapter.lora.alpha.

    Raises:
        InputError: a file cannot be read, the adapter is more than plain LoRA on the layers' matrices, does
            not fit the base, or holds NaN or infinite values. All faults of the adapter are named, a line
            each.
        SgLocalError: `out_path` could not be written.
    """
    base = read_model_header(base_path)
    require_supported(base)
    faults = Faults()
    weights_path = adapter_dir / WEIGHTS_FILE
    config, stored = _read_directory(adapter_dir, faults)
    pairs = _pairs(weights_path, base, config, _read_safetensors(weights_path, stored), faults)
    faults.raise_any()

    values = {key: string_value(text) for key, text in metadata.items()}
    values["general.architecture"] = string_value(base.architecture)
    values["general.type"] = string_value("adapter")
    values["adapter.type"] = string_value("lora")
    values["adapter.lora.alpha"] = float32_value(config.alpha)
    arrays = {f"{name}.lora_{half}": array for name, pair in pairs.items() for half, array in pair.items()}
    outputs = [OutputTensor(name, array.shape[::-1], "F32", array.nbytes) for name, array in arrays.items()]
    with atomic_path(out_path) as temporary, open(temporary, "wb") as file:
        write_header(file, values, outputs, DEFAULT_ALIGNMENT_BYTES)
        for array in arrays.values():
            file.write(array.tobytes())
            pad(file, DEFAULT_ALIGNMENT_BYTES)


def fields_for_peft(adapter_dir: Path) -> dict[str, object]:
    """The fields of peft.LoraConfig of an adapter that `write_adapter_gguf` takes, for the modules that it has.

    Raises InputError with all faults of the directory's configuration.
    """
    faults = Faults()
    config, stored = _read_directory(adapter_dir, faults)
    faults.raise_any()
    return peft_fields(config, _stored_modules(stored))


def directory_for_peft(adapter_dir: Path, clean_dir: Path) -> Path:
    """The adapter's directory, or clean_dir with its weights under the names that PEFT gives them today."""
    from safetensors.numpy import save_file

    stored = _stored(adapter_dir / WEIGHTS_FILE)
    clean = {name: _clean_name(name) for name in stored}
    if all(name == now for name, now in clean.items()):
        return adapter_dir
    arrays = _read_safetensors(adapter_dir / WEIGHTS_FILE, stored)
    save_file(
        {clean[name]: np.ascontiguousarray(array) for name, array in arrays.items()}, clean_dir / WEIGHTS_FILE
    )
    return clean_dir


def read_adapter_gguf(path: Path) -> Adapter:
    """Reads a GGUF LoRA adapter whole.

    Raises InputError, with all faults, where the file is no LoRA adapter, has no alpha, has tensors of
    half pairs or other tensors, or holds NaN or infinite values.
    """
    header = read_header(path)
    if header.kind != "adapter" or header.metadata.get("adapter.type") != "lora":
        raise InputError(f"{path} is not a LoRA adapter; give a file that `sg-local export` wrote")
    faults = Faults()
    alpha = header.metadata.get("adapter.lora.alpha")
    # llama.cpp takes alpha 0 for scale 1, PEFT for scale 0.
    if not isinstance(alpha, float) or not (math.isfinite(alpha) and alpha > 0):
        faults.add(f"{path}: adapter.lora.alpha is {alpha!r:.40}, not a number over 0")
    halves: dict[str, dict[str, Floats]] = {}
    for tensor in header.tensors:
        base_name, dot, half = tensor.name.rpartition(".lora_")
        if not dot or half not in ("a", "b") or len(tensor.shape) != 2:
            faults.add(f"{path}: tensor {tensor.name!r} is not half of a LoRA pair")
            continue
        blocks = [np.empty((0, tensor.shape[0]), np.float32)]
        blocks += [block for _, block in row_blocks(header, tensor)]
        halves.setdefault(base_name, {})[half] = np.concatenate(blocks)
    for base_name, pair in halves.items():
        if len(pair) < 2:
            faults.add(f"{path}: tensor {base_name!r} has only one half of its LoRA pair")
        elif not len(pair["a"]) == pair["b"].shape[1] > 0:
            faults.add(
                f"{path}: tensor {base_name!r} has the ranks {len(pair['a'])} and {pair['b'].shape[1]}, which differ"
                if len(pair["a"]) != pair["b"].shape[1]
                else f"{path}: tensor {base_name!r} has the rank 0"
            )
    if not halves:
        faults.add(f"{path}: the adapter has no tensors")
    faults.raise_any()
    return Adapter(
        alpha=float(alpha) if isinstance(alpha, float) else 0.0,
        metadata=header.metadata,
        tensors={name: (pair["a"], pair["b"]) for name, pair in halves.items()},
    )


def base_matrices(header: GgufHeader) -> dict[str, ModelTensor]:
    """The matrices of a base model that an adapter may change: GGUF name → shape and Hugging Face name.

    Raises InputError where the metadata is faulty, or gives a matrix another shape than it has.
    """
    faults = Faults()
    expected = model_tensors(header, read_dimensions(header))
    matrices = {}
    for tensor in header.tensors:
        wanted = expected.get(tensor.name)
        if wanted is None or not wanted.takes_lora:
            continue
        matrices[tensor.name] = wanted
        if tensor.shape[::-1] != wanted.shape:
            faults.add(
                f"{header.path}: tensor {tensor.name} has the shape {tensor.shape[::-1]}, and the metadata "
                f"says {wanted.shape}; get another copy of the model"
            )
    faults.raise_any()
    return matrices


def _read_directory(adapter_dir: Path, faults: Faults) -> tuple[AdapterConfig, dict[str, StoredTensor]]:
    """What the configuration says, and which tensors there are."""
    config_path = adapter_dir / CONFIG_FILE
    fields = read_fields(config_path)
    stored = _stored(adapter_dir / WEIGHTS_FILE)
    return checked_config(config_path, fields, _stored_modules(stored), faults), stored


def _stored(path: Path) -> dict[str, StoredTensor]:
    """What is in adapter_model.safetensors."""
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise InputError(
            f"{pickled} is a pickle, which can run code when it is read; "
            "save the adapter with safe_serialization=True"
        )
    if path.exists() and (size_bytes := path.stat().st_size) > MAX_WEIGHTS_BYTES:
        raise InputError(f"{path} has {size_bytes} bytes, over the limit of {MAX_WEIGHTS_BYTES}")
    return stored_tensors(path)


def _stored_modules(names: Iterable[str]) -> dict[str, str]:
    """The modules that an adapter has values of, by its tensors' names: name in transformers' model → name there."""
    matches = filter(None, map(_PEFT_NAME.fullmatch, names))
    return {_module(match["module"]): match["module"] for match in matches}


def _module(stored_as: str) -> str:
    """A module's name in the model that the GGUF is of, without what torch.compile or a larger model put around it."""
    return _TEXT_PART.sub("", stored_as.replace("_orig_mod.", ""))


def _clean_name(name: str) -> str:
    """A tensor's name as PEFT saves it."""
    match = _PEFT_NAME.fullmatch(name)
    return f"base_model.model.{_module(match['module'])}.lora_{match['part']}.weight" if match else name


def _read_safetensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Floats]:
    arrays: dict[str, Floats] = {}
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name!r:.120} is of type {tensor.dtype}; save it as float32")
        arrays[name] = tensor.values()
    return arrays


def _why_no_place(name: str, base: GgufHeader) -> str:
    """Why a tensor of an adapter is none for the base, by its name, and what helps."""
    if _VOCABULARY.search(name):
        return "changes the vocabulary's weights; take embed_tokens and lm_head out of target_modules"
    reason = f"has no place in {base.path.name}; "
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name) or not name.startswith("base_model.model."):
        return reason + "it is not named as PEFT saves adapters: save it with model.save_pretrained"
    if re.search("language_model|vision|visual|multi_modal|audio", name):
        return reason + (
            "the adapter is of a model for images or sound, of which the GGUF has the text part: train that part "
            "alone, loaded with its class for causal language models"
        )
    return reason + (
        "the adapter is of a model with other layers or modules: give that model's GGUF with --model, or train on this "
        "base, on its layers' matrices"
    )


def _pairs(
    path: Path, base: GgufHeader, config: AdapterConfig, arrays: dict[str, Floats], faults: Faults
) -> dict[str, dict[str, Floats]]:
    """Base tensor name → {"a": A, "b": B with rows in llama.cpp's order}."""
    matrices = base_matrices(base)
    gguf_names = {tensor.hf.removesuffix(".weight"): name for name, tensor in matrices.items()}
    halves: dict[str, dict[str, Floats]] = {}
    for name, array in sorted(arrays.items()):
        match = _PEFT_NAME.fullmatch(name)
        module = _module(match["module"]) if match else ""
        gguf_name = gguf_names.get(module)
        if not match or not gguf_name:
            faults.add(f"{path}: tensor {name!r:.120} {_why_no_place(name, base)}")
            continue
        if match["part"] in halves.get(gguf_name, {}):
            faults.add(
                f"{path}: tensor {name!r:.120} is there twice, under two names; save the adapter again"
            )
            continue
        if not config.applies_to(module, match["module"]):
            faults.add(
                f"{path}: tensor {name} is of a matrix that {CONFIG_FILE} leaves out (target_modules, "
                "exclude_modules, layers_to_transform), so PEFT does not apply it; name it there, or save without it"
            )
            continue
        rank = config.rank_of(match["module"])
        rows, columns = matrices[gguf_name].shape
        wanted = (rank, columns) if match["part"] == "A" else (rows, rank)
        if array.shape != wanted:
            faults.add(
                f"{path}: tensor {name} has the shape {array.shape}, and {gguf_name} of {base.path.name}, "
                f"{(rows, columns)}, needs {wanted} at rank {rank}{' (rank_pattern)' if rank != config.rank else ''}"
            )
        elif not np.isfinite(array).all():
            faults.add(f"{path}: tensor {name} has NaN or infinite values; train with a lower learning rate")
        else:
            # llama.cpp has one alpha for all tensors, and scales each by its own rank.
            share = config.alpha_of(match["module"]) / config.alpha if match["part"] == "B" else 1.0
            halves.setdefault(gguf_name, {})[match["part"]] = array * np.float32(share)
    if not arrays:
        faults.add(f"{path}: the adapter has no tensors; train again")
    for gguf_name, pair in halves.items():
        if len(pair) < 2 and not faults.count:
            faults.add(f"{path}: {matrices[gguf_name].hf} has only one half of its LoRA pair")
    if not config.begins_at_zero and not faults.count:
        for module, gguf_name in gguf_names.items():
            if config.applies_to(module) and gguf_name not in halves:
                faults.add(
                    f"{path}: there is no tensor of {module}, which {CONFIG_FILE} names, and its "
                    "init_lora_weights would fill it at random; save the whole adapter, or take it out there"
                )
    if faults.count:
        return {}
    _say_what_is_not_there(
        path, base, config, {module for module, name in gguf_names.items() if name not in halves}
    )
    return {
        name: {
            "a": halves[name]["A"][:, tensor.column_order],
            "b": halves[name]["B"][tensor.row_order],
        }
        for name, tensor in matrices.items()
        if name in halves
    }


def _say_what_is_not_there(path: Path, base: GgufHeader, config: AdapterConfig, modules: set[str]) -> None:
    """Tells of matrices and layers that the configuration names and the adapter, or the model, does not have."""
    missing = sorted(module for module in modules if config.applies_to(module))
    if missing:
        say(
            f"{path}: no tensors of {len(missing)} matrices that {CONFIG_FILE} names, such as {missing[0]}: "
            "they stay as they are in the base"
        )
    n_layers = read_dimensions(base).n_layers
    if others := sorted(layer for layer in config.layers or () if not 0 <= layer < n_layers):
        say(
            f"{path.with_name(CONFIG_FILE)}: layers_to_transform names layer {others[0]}, and {base.path.name} has "
            f"{n_layers}"
        )
