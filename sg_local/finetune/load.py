"""Loads the base's weights as a torch model with a new LoRA adapter, with Unsloth or with PEFT alone.

    load_with_lora(weights_dir, tokenizer_dir, settings, 512) -> (PeftModel, tokenizer)

Unsloth is faster and needs less memory on NVIDIA, AMD and Intel GPUs; PEFT runs wherever torch does. Both write the
same adapter files. Sources: LoRA (arXiv 2106.09685); for load_in_4bit QLoRA (arXiv 2305.14314), NF4 with double
quantization.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sg_local.child_process import card_is_full, no_card_memory
from sg_local.errors import InputError, SgLocalError
from sg_local.finetune.environment import prepare_process
from sg_local.finetune.stand_in_tokenizer import Vocabulary, write_stand_in_tokenizer
from sg_local.settings import TrainSettings


def has_bfloat16() -> bool:
    """Whether the GPU has bfloat16. Older GPUs emulate it, which is slow."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


def load_with_lora(
    weights_dir: Path,
    vocabulary: Vocabulary,
    target_modules: Sequence[str],
    settings: TrainSettings,
    max_tokens: int,
) -> tuple[Any, Any]:
    """The model with a new adapter, and a stand-in tokenizer, which is written into the current directory.

    target_modules: names of the matrices that get LoRA; max_tokens: length of the longest sequence in a batch.
    Call `prepare_process` first.
    """
    if settings.trainer == "unsloth":
        return _load_with_unsloth(weights_dir, vocabulary, target_modules, settings, max_tokens)
    return _load_with_peft(weights_dir, vocabulary, target_modules, settings)


def _load_with_unsloth(
    weights_dir: Path,
    vocabulary: Vocabulary,
    target_modules: Sequence[str],
    settings: TrainSettings,
    max_tokens: int,
) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel  # before trl, transformers and peft, which it patches

    # isort: split
    import torch

    has_gpu = torch.cuda.is_available()
    write_stand_in_tokenizer(Path("tokenizer"), vocabulary)
    trained_for = _base_config(weights_dir)["max_position_embeddings"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(weights_dir),
        tokenizer_name="tokenizer",
        # For more than the model's context Unsloth would scale its positions (RoPE), which no program that serves it
        # does. A batch may be longer than that: its positions restart with every row.
        max_seq_length=min(max_tokens, trained_for),
        dtype=None if has_gpu else torch.float32,
        load_in_4bit=settings.load_in_4bit,
        local_files_only=True,
        # All of it, or memory runs out: else what finds no room would be computed from host memory, and crawl.
        **({"device_map": {"": 0}} if has_gpu else {}),
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(target_modules),
        lora_dropout=settings.lora_dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if settings.uses_checkpointing(has_gpu) else False,
        random_state=settings.seed,
        use_rslora=False,  # a GGUF adapter knows alpha / r only
    )
    return model, tokenizer


def require_card(card: str, trainer: str) -> None:
    """Raises InputError if the card of this machine cannot be trained on: the CPU would be many times slower.

    card: its name, "" where none is known; torch may know of one (AMD). Call `prepare_process` first.
    """
    if trainer == "unsloth":
        try:
            import unsloth  # noqa: F401 - before torch, which it patches
        except (NotImplementedError, RuntimeError, ImportError) as error:
            reason = f"Unsloth says: {' '.join(str(error).split()):.200}"
            if card:
                raise _unusable(card, reason) from error
            raise InputError(
                f"training with Unsloth does not work on this machine ({reason}): start a run with --trainer peft, or, "
                "where that is for a card that nothing can use, set CUDA_VISIBLE_DEVICES=-1 and call again"
            ) from error
    import torch

    if torch.cuda.is_available():
        if reason := card_fault():
            raise _unusable(card or torch.cuda.get_device_name(), reason)
    elif card:
        raise _unusable(card, f"torch {torch.__version__} finds none")


def try_card(card: str, trainer: str) -> None:
    """`require_card`, in a process that was made for it."""
    with tempfile.TemporaryDirectory() as place:
        here = os.getcwd()
        prepare_process(Path(place), on_gpu=bool(card))
        try:
            with redirect_stdout(sys.stderr):
                require_card(card, trainer)
        finally:
            os.chdir(here)


def card_fault() -> str:
    """Why the card that torch has cannot compute a sum, or quantize with bitsandbytes, and which of them; "" if it can.

    Where bitsandbytes does not work, Unsloth loads 16-bit weights in place of 4-bit ones; the optimizer needs it too.
    """
    import torch

    works_with = "torch"
    try:
        torch.zeros(8, device="cuda").add_(1).sum().item()
        works_with = "bitsandbytes"
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, 64, device="cuda", dtype=torch.float16), quant_type="nf4")
        torch.cuda.synchronize()
    except Exception as error:  # whatever a library says that was built for another card, driver or CUDA
        if no_card_memory(str(error)):
            raise card_is_full(str(error)) from error
        return f"{works_with}: {type(error).__name__}: {' '.join(str(error).split()):.200}"
    return ""


def _unusable(card: str, reason: str) -> InputError:
    return InputError(
        f"this machine has a card ({card}), and training cannot use it ({reason}): `sg-local doctor` names the fix; to "
        "train on the CPU all the same, set CUDA_VISIBLE_DEVICES=-1 and call again"
    )


def require_same_positions(model: Any, weights_dir: Path) -> None:
    """Raises SgLocalError if the loaded model's rotary positions are not those of the base's configuration."""
    expected = _base_config(weights_dir).get("rope_parameters") or {}
    config = model.get_base_model().config
    loaded = getattr(config, "rope_parameters", None) or {}
    changed = {
        key: (value, loaded[key])
        for key, value in expected.items()
        if key in loaded and loaded[key] != value and not isinstance(value, dict)
    }
    if loaded.get("factor", 1.0) != expected.get("factor", 1.0):
        changed["factor"] = (expected.get("factor", 1.0), loaded["factor"])
    if changed:
        changes = ", ".join(f"{key} is {now!r} and not {before!r}" for key, (before, now) in changed.items())
        raise SgLocalError(
            f"the trainer changed the model's rotary positions ({changes}): nothing was trained; take --trainer peft "
            "in a new run, and please report it"
        )


def _base_config(weights_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((weights_dir / "config.json").read_text("utf-8"))
    return config


def _load_with_peft(
    weights_dir: Path, vocabulary: Vocabulary, target_modules: Sequence[str], settings: TrainSettings
) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

    set_seed(settings.seed)
    has_gpu = torch.cuda.is_available()
    dtype = torch.float32
    if has_gpu:
        dtype = torch.bfloat16 if has_bfloat16() else torch.float16
    quantization = None
    if settings.load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    write_stand_in_tokenizer(Path("tokenizer"), vocabulary)
    model = AutoModelForCausalLM.from_pretrained(
        str(weights_dir),
        dtype=dtype,
        quantization_config=quantization,
        # sdpa takes any mask; a flash kernel would ignore that of a tree
        attn_implementation=_base_config(weights_dir).get("attn_implementation", "sdpa"),
        device_map={"": 0} if has_gpu else None,
        local_files_only=True,
        use_safetensors=True,
    )
    checkpointing = settings.uses_checkpointing(has_gpu)
    if settings.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(target_modules),
            lora_dropout=settings.lora_dropout,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    return model, AutoTokenizer.from_pretrained("tokenizer", local_files_only=True)
