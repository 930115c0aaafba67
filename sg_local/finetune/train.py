"""Trains a LoRA adapter on rows of token ids, with TRL's SFTTrainer and the loss of loss.py.

    TrainRow(prompt=(1, 9690, ...), answer=(6827, 2))   loss on the answer and its end token only
    -> adapter/adapter_config.json, adapter/adapter_model.safetensors

No tokenizer takes part: the ids are llama.cpp's. The rows of a batch are packed as a prompt tree (batches.py) if the
model computes the same with it for the first batch.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sg_local.architectures import RECURRENT
from sg_local.child_process import no_card_memory
from sg_local.errors import InputError, SgLocalError
from sg_local.finetune.batches import Batch, TrainRow, padded_batch, tree_batch
from sg_local.finetune.checkpoints import last_complete, mark_complete, training_key
from sg_local.finetune.load import has_bfloat16, load_with_lora, require_card, require_same_positions
from sg_local.finetune.loss import (
    FLOAT16_LOSS_SCALE,
    batch_loss,
    check_tree,
    is_beyond_one_mask,
    tensors,
)
from sg_local.finetune.stand_in_tokenizer import Vocabulary
from sg_local.progress import say
from sg_local.settings import TrainSettings

N_CHECKPOINTS = 2  # to keep: the newer one may be half-written when the process is killed


def train_adapter(
    weights_dir: Path,
    vocabulary: Vocabulary,
    rows: Sequence[TrainRow],
    adapter_dir: Path,
    checkpoints_dir: Path,
    base: str,
    target_modules: Sequence[str],
    settings: TrainSettings,
    on_step: Callable[[int], None],
    *,
    card: str = "",
    on_loaded: Callable[[], None] = lambda: None,
    on_loss: Callable[[float], None] = lambda _loss: None,
) -> dict[str, object]:
    """Trains on the rows and saves the adapter in adapter_dir. Call `prepare_process` first.

    Works in the current directory, which `prepare_process` made. If checkpoints_dir has a complete checkpoint of the
    same training (rows, settings, `base`: the base's hash), it goes on from there.

    on_step gets the number of optimizer steps since its last call, on_loss the loss of a step; on_loaded is called when
    weights_dir is not needed any more. card is the name of the card that the training should use, "" for none. Returns
    steps, losses, token counts, and whether trees were used. Raises InputError if the training diverged (a loss is
    NaN).
    """
    shuffled = list(rows)
    random.Random(settings.seed).shuffle(shuffled)
    longest = max(row.n_tokens for row in rows)
    with _quiet(), memory_error_explained(settings):
        # This comes first: it imports Unsloth, which patches what is imported later.
        require_card(card, settings.trainer)
        model, tokenizer = load_with_lora(
            weights_dir, vocabulary, target_modules, settings, longest * settings.batch_size
        )
        require_same_positions(model, weights_dir)
        # PEFT would look there for the size of the vocabulary when it saves, and warn where the weights are gone.
        model.peft_config[model.active_adapter].base_model_name_or_path = None
        model.get_base_model().name_or_path = ""  # or PEFT takes it from here
        on_loaded()

        import torch
        from transformers import PrinterCallback

        if settings.n_threads > 0:
            torch.set_num_threads(settings.n_threads)
        key = training_key({"base": base, "rows": [asdict(row) for row in shuffled], **settings.as_dict()})
        trainer = row_trainer(model, tokenizer, shuffled, checkpoints_dir, settings)
        trainer.remove_callback(PrinterCallback)  # the losses are in the manifest
        how = _choose_batches(trainer, shuffled, settings)

    trainer.add_callback(_step_reporter(checkpoints_dir, key, settings, on_step, on_loss))
    checkpoint = last_complete(checkpoints_dir, key)
    if checkpoint:
        say(f"train: going on from {checkpoint.name}")
    with _quiet(), memory_error_explained(settings):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
    if any(loss != loss for loss in losses):
        raise InputError(
            f"the training diverged (loss is no number): lower --learning-rate "
            f"{settings.learning_rate} in a new run"
        )
    model.save_pretrained(str(adapter_dir))
    _clean_config(adapter_dir / "adapter_config.json", target_modules)
    (adapter_dir / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    return {
        "steps": len(losses),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "losses": losses,  # of each step
        "rows_tokens": sum(row.n_tokens for row in rows),
        "computed_tokens": trainer.computed_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else trainer.args.device.type,
        **how,
    }


def _step_reporter(
    checkpoints_dir: Path,
    key: str,
    settings: TrainSettings,
    on_step: Callable[[int], None],
    on_loss: Callable[[float], None],
) -> Any:
    """A callback for the trainer that reports steps, and saves a checkpoint every `checkpoint_seconds`."""
    from transformers import TrainerCallback

    class StepReporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.saved_at = time.monotonic()
            self.steps = 0

        def on_step_end(self, _args: Any, state: Any, control: Any, **_rest: Any) -> None:
            on_step(state.global_step - self.steps)  # more than one after a checkpoint
            self.steps = state.global_step
            if time.monotonic() - self.saved_at >= settings.checkpoint_seconds:
                control.should_save = state.global_step < state.max_steps

        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_rest: Any
        ) -> None:
            if "loss" in logs:
                on_loss(logs["loss"])

        def on_save(self, _args: Any, state: Any, _control: Any, **_rest: Any) -> None:
            mark_complete(checkpoints_dir / f"checkpoint-{state.global_step}", key)
            self.saved_at = time.monotonic()

    return StepReporter()


def row_trainer(
    model: Any, tokenizer: Any, rows: Sequence[TrainRow], checkpoints_dir: Path, settings: TrainSettings
) -> Any:
    """TRL's SFTTrainer on rows of token ids; its `to_batch` makes a batch of rows, padded or a tree."""
    import torch
    from datasets import Dataset
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import SFTConfig, SFTTrainer

    class RowsByLength(torch.utils.data.Sampler):  # type: ignore[misc]
        """Rows of about the same length together.

        The order follows from seed and epoch alone, so that a killed training goes on with it. That of transformers'
        own LengthGroupedSampler follows from torch's state, which within an epoch is another one than at its start.
        """

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(rows)

        def __iter__(self) -> Iterator[int]:
            generator = torch.Generator().manual_seed((settings.seed << 16) + self.epoch)
            lengths = [row.n_tokens for row in rows]
            return iter(get_length_grouped_indices(lengths, settings.batch_size, generator=generator))

    class RowTrainer(SFTTrainer):  # type: ignore[misc]
        to_batch: Callable[[Sequence[TrainRow]], Batch] = staticmethod(padded_batch)
        groups_by_length = False
        computed_tokens = 0

        def _get_train_sampler(self, *datasets: Any) -> Any:
            return RowsByLength() if self.groups_by_length else super()._get_train_sampler(*datasets)

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            with self.accelerator.autocast():
                return batch_loss(self.accelerator.unwrap_model(model), inputs)

        def loss_of(self, batch: Batch) -> Any:
            """The loss of a batch that the trainer did not collate."""
            with self.accelerator.autocast():
                inputs = self._prepare_inputs(tensors(batch, self.model.config))
                return batch_loss(self.accelerator.unwrap_model(self.model), inputs)

        def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
            batch = self.to_batch([rows[item["row"]] for item in items])
            self.computed_tokens += batch.input_ids.size
            return tensors(batch, self.model.config)

    has_gpu = torch.cuda.is_available()
    use_bf16 = has_bfloat16()
    # TRL wants ids and labels; `collate` reads the rows.
    dataset = Dataset.from_list(
        [
            {"row": index, "input_ids": [*row.prompt, *row.answer], "labels": [*row.prompt, *row.answer]}
            for index, row in enumerate(rows)
        ]
    )
    arguments = SFTConfig(
        output_dir=str(checkpoints_dir),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
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
        gradient_checkpointing=False,  # set when the model was loaded
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would report the last good loss instead of NaN
        dataloader_pin_memory=has_gpu,
        save_strategy="no",
        save_total_limit=N_CHECKPOINTS,
        report_to="none",
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=True,
        packing=False,
    )
    trainer: Any = RowTrainer(
        model=model,
        processing_class=tokenizer,
        args=arguments,
        train_dataset=dataset,
        data_collator=lambda items: trainer.collate(items),
    )
    return trainer


def _choose_batches(trainer: Any, rows: Sequence[TrainRow], settings: TrainSettings) -> dict[str, object]:
    """Trees, if the first batch has the same loss and gradient as when padded; else padded rows, grouped by length."""
    reason = None
    kinds = getattr(trainer.model.config, "layer_types", None) or ()
    if not settings.prompt_tree:
        reason = "--no-prompt-tree"
    elif settings.lora_dropout > 0:
        reason = f"--lora-dropout {settings.lora_dropout} would be drawn once for what rows share"
    elif recurrent := RECURRENT.keys() & set(kinds):
        reason = RECURRENT[min(recurrent)]
    elif is_beyond_one_mask(trainer.model, max(row.n_tokens for row in rows)):
        reason = (
            "Unsloth takes one mask for all layers, and some rows are longer than the window of some layers"
        )
    else:
        model = trainer.model.train()
        if hasattr(model, "for_training"):
            # Unsloth's trainer leaves the model in inference mode, without gradient checkpointing: much more memory.
            model.for_training()
        try:
            scale = FLOAT16_LOSS_SCALE if trainer.args.fp16 else 1.0
            check = check_tree(model, rows[: settings.batch_size], trainer.loss_of, scale)
        # A kernel, or a forward pass of the trainer's own, that cannot take the mask or the positions.
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            if _is_of_memory(error):  # not the tree's fault: the training would run out of memory too
                raise
            model.zero_grad(set_to_none=True)
            reason = f"this model cannot be computed with a tree ({str(error).partition(chr(10))[0]:.200})"
        else:
            if check.is_equal:
                trainer.to_batch = tree_batch
                say(
                    f"train: rows packed as a tree; first batch equals padded: loss {check.loss:.4f}, differences "
                    f"{check.loss_difference:.1e} in loss, {check.gradient_difference:.1e} in gradient"
                )
                return {"batches": "tree", "tree_check": asdict(check)}
            reason = (
                f"the first batch as a tree differs by {check.loss_difference:.1e} in loss and "
                f"{check.gradient_difference:.1e} in gradient, the bound is {check.bound:.0e}"
            )
    trainer.groups_by_length = True
    say(f"train: rows padded and grouped by length: {reason}")
    return {"batches": "padded", "padded_because": reason}


def _clean_config(path: Path, target_modules: Sequence[str]) -> None:
    """Removes from an adapter's configuration what differs from run to run: this machine's path, a set's order."""
    config = json.loads(path.read_text("utf-8"))
    config["base_model_name_or_path"] = None
    config["target_modules"] = sorted(target_modules)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _torch_has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@contextmanager
def memory_error_explained(settings: TrainSettings) -> Iterator[None]:
    """Turns torch's out-of-memory error into an SgLocalError that says which options need less memory."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not _is_of_memory(error):
            raise
        smaller = [] if settings.load_in_4bit else ["--load-in-4bit"]
        smaller += [f"--batch-size {max(1, settings.batch_size // 2)}"] if settings.batch_size > 1 else []
        is_on = settings.uses_checkpointing(has_gpu=_torch_has_gpu())
        smaller += [] if is_on else ["--gradient-checkpointing always"]
        advice = "take a smaller model"
        if smaller:
            advice = (
                f"start a run with {' or '.join(smaller)}; `sg-local plan` tells beforehand what it needs"
            )
        if _torch_has_gpu():
            advice = f"close other programs that use the card and call again, or {advice}"
        raise SgLocalError(f"memory ran out in training ({text.splitlines()[0]:.200}): {advice}") from error


def _is_of_memory(error: Exception) -> bool:
    """Whether torch, CUDA outside of torch's own memory, or the CPU's allocator lacks memory."""
    text = str(error)
    return "out of memory" in text or "not enough memory" in text or no_card_memory(text)


@contextmanager
def _quiet() -> Any:
    """Sends the output of the training packages to stderr, so that stdout holds data only."""
    with redirect_stdout(sys.stderr):
        yield
