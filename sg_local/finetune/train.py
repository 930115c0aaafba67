"""Rows of token ids to a LoRA adapter: Unsloth's FastLanguageModel in TRL's SFTTrainer.

    TrainRow(prompt=(1, 9690, ...), answer=(6827, 2))   loss on the answer and its end token only
    -> adapter/adapter_config.json, adapter/adapter_model.safetensors

No tokenizer takes part: the ids are llama.cpp's. Settings that differ from TRL's defaults are named below.
Source: QLoRA (arXiv 2305.14314) for --load-in-4bit; LoRA on all seven projections of a layer.
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg_local.errors import InputError
from sg_local.finetune.stand_in_tokenizer import Vocabulary, write_stand_in_tokenizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TrainRow:
    """Token ids of one row: the prompt with BOS where the model wants one, the answer with its end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class TrainSettings:
    """What the trainer needs to know; the words are those of `sg_local.settings`."""

    rank: int
    alpha: float
    learning_rate: float
    epochs: int
    batch_size: int
    load_in_4bit: bool
    n_threads: int
    seed: int


def train_adapter(
    weights_dir: Path,
    vocabulary: Vocabulary,
    rows: Sequence[TrainRow],
    adapter_dir: Path,
    settings: TrainSettings,
    on_step: Callable[[int], None],
) -> dict[str, Any]:
    """Trains on the rows and saves the adapter into adapter_dir; call `prepare_process` first.

    Works in the current directory, which `prepare_process` made.

    on_step is told the number of optimizer steps since its last call. Returns loss by step and token counts.
    Raises InputError when the training diverged (a loss that is no number).
    """
    with _quiet():
        from unsloth import FastLanguageModel  # before trl, transformers and peft, which it patches

        # isort: split
        import torch
        from datasets import Dataset
        from transformers import DataCollatorForSeq2Seq, PrinterCallback, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        write_stand_in_tokenizer(Path("tokenizer"), vocabulary)
        if settings.n_threads > 0:
            torch.set_num_threads(settings.n_threads)
        has_gpu = torch.cuda.is_available()
        longest = max(row.n_tokens for row in rows)
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(weights_dir),
            tokenizer_name="tokenizer",
            max_seq_length=longest,
            dtype=None if has_gpu else torch.float32,
            load_in_4bit=settings.load_in_4bit,
            local_files_only=True,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(TARGETS),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if has_gpu else False,
            random_state=settings.seed,
            use_rslora=False,  # a GGUF adapter knows alpha / r only
        )

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _args: Any, _state: Any, _control: Any, **_rest: Any) -> None:
            on_step(1)

    shuffled = list(rows)
    random.Random(settings.seed).shuffle(shuffled)
    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "attention_mask": [1] * row.n_tokens,
                "labels": [IGNORED_LABEL] * len(row.prompt) + list(row.answer),
            }
            for row in shuffled
        ]
    )
    use_bf16 = has_gpu and torch.cuda.is_bf16_supported()
    arguments = SFTConfig(
        output_dir="trainer",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=longest,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=1,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=5,
        weight_decay=0.0,
        optim="adamw_8bit" if has_gpu else "adamw_torch",
        bf16=use_bf16,
        fp16=has_gpu and not use_bf16,
        train_sampling_strategy="group_by_length",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        packing=False,
    )
    with _quiet():
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            args=arguments,
            train_dataset=dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED_LABEL),
            callbacks=[Report()],
        )
        trainer.remove_callback(PrinterCallback)  # the losses are in the manifest
        trainer.train()
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    if any(loss != loss for loss in losses):
        raise InputError(
            f"the training diverged (loss is no number): lower --learning-rate {settings.learning_rate}"
        )
    model.save_pretrained(str(adapter_dir))
    _clean_config(adapter_dir / "adapter_config.json")
    (adapter_dir / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return {
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "rows_tokens": sum(row.n_tokens for row in rows),
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
    }


def _clean_config(path: Path) -> None:
    """Takes the machine's path out of an adapter's configuration."""
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


@contextmanager
def _quiet() -> Any:
    """Sends what the training packages print to stderr, so that stdout holds data only."""
    with redirect_stdout(sys.stderr):
        yield
