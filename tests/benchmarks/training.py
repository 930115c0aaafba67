"""Training side by side: rows packed as a tree, and TRL's SFTTrainer with its default collation, on one PEFT model.

    three demonstrations    median s a step   ratio   tokens a step   peak memory
    tree                               3.30    1.00             454       1900 MB
    SFTTrainer                        12.14    3.68            1488       2900 MB

    python tests/benchmarks/training.py [--rows 200] [--only demonstrations]

Both go through the same rows in the same order, a step of one after a step of the other: forward and backward pass of a
batch of 8, LoRA r=16 on all seven projections, float32, loaded through Unsloth. Ratios are medians of the steps' own.
The losses of each pair of steps have to agree. Peak memory is of a process that does four steps of one kind.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sg_local.finetune.batches import TrainRow, tree_batch
from sg_local.finetune.environment import prepare_process
from sg_local.finetune.load import load_with_lora
from sg_local.finetune.stand_in_tokenizer import Vocabulary
from sg_local.finetune.train import row_trainer
from sg_local.gguf_header import read_model_header
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.tensors import lora_targets
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.models import resolve_model
from sg_local.selfguide.prompts import answer_messages
from sg_local.settings import TrainSettings
from sg_local.task import load_task
from sg_local.task_files.rows import load_test_rows

TASK = "guest-feedback"
GOALS = {"demonstrations": 3.5, "no demonstrations": 2.2}
BATCH_SIZE, N_MEMORY_STEPS = 8, 4
WORDINGS = ("{}", "{} Thank you.", "Hello. {}")


def main() -> None:
    """Measures both kinds of prompts and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--only", choices=list(GOALS))
    parser.add_argument("--memory-of", choices=("tree", "SFTTrainer"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = [arguments.only] if arguments.only else list(GOALS)
    if arguments.memory_of:
        rows, vocabulary = make_rows(BATCH_SIZE * N_MEMORY_STEPS, kinds[0] == "demonstrations")
        steps(arguments.weights, vocabulary, rows, [arguments.memory_of])
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        return
    packages = ("torch", "transformers", "trl", "peft", "unsloth")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "hf"
        write_base_weights(resolve_model("smollm2-135m"), weights)
        # Memory first: a process counts the size of the one that started it as its own.
        memory = {kind: peak_memory_mb(kind, weights) for kind in kinds}
        for kind in kinds:
            rows, vocabulary = make_rows(arguments.rows, kind == "demonstrations")
            show(kind, rows, steps(weights, vocabulary, rows, ["tree", "SFTTrainer"]), memory[kind])


def peak_memory_mb(kind: str, weights: Path) -> dict[str, int]:
    """Of each contender, in a process of its own."""
    command = [sys.executable, __file__, "--only", kind, "--weights", str(weights), "--memory-of"]
    found = {}
    for contender in ("tree", "SFTTrainer"):
        ran = subprocess.run([*command, contender], check=True, stdout=subprocess.PIPE, text=True)
        found[contender] = int(ran.stdout.splitlines()[-1])
    return found


def make_rows(n_rows: int, with_demonstrations: bool) -> tuple[list[TrainRow], Vocabulary]:
    """A shipped task's test rows, in several wordings, as token ids."""
    task = load_task(TASK)
    examples = [
        (wording.format(row.input), row.output) for wording in WORDINGS for row in load_test_rows(task)
    ]
    with load_model(resolve_model("smollm2-135m"), vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        source = read_model_header(resolve_model("smollm2-135m")).chat_template
        template = tokenizer.chat_template(source or "")
        rows = []
        for text, answer in examples[:n_rows]:
            messages = answer_messages(task.instruction, text, task.examples if with_demonstrations else ())
            prompt = tokenizer.encode_prompt(template, messages)
            rows.append(TrainRow(tuple(prompt), tuple(tokenizer.encode_answer(template, messages, answer))))
        vocabulary = Vocabulary(
            [tokenizer.text_of(token) for token in range(tokenizer.n_vocab)],
            tokenizer.bos,
            tokenizer.eos,
            tokenizer.pad,
        )
    assert len(rows) == n_rows, "the task has too few rows"
    return rows, vocabulary


def steps(
    weights: Path, vocabulary: Vocabulary, rows: list[TrainRow], contenders: list[str]
) -> dict[str, list[tuple[float, float, int]]]:
    """(seconds, loss, tokens) of each step of each contender, alternately."""
    with tempfile.TemporaryDirectory() as directory:
        prepare_process(Path(directory))
        settings = TrainSettings(
            trainer="unsloth",
            rank=16,
            alpha=16,
            learning_rate=1e-4,
            epochs=1,
            batch_size=BATCH_SIZE,
            gradient_checkpointing="never",
            checkpoint_seconds=10_000,
        )
        model, tokenizer = load_with_lora(weights, vocabulary, lora_targets("llama"), settings, 4096)
        made: dict[str, Any] = {}
        if "tree" in contenders:
            made["tree"] = row_trainer(model, tokenizer, rows, Path("out"), settings)
            made["tree"].to_batch = tree_batch
        if "SFTTrainer" in contenders:
            made["SFTTrainer"] = default_trainer(model, tokenizer, rows)
        for trainer in made.values():
            trainer.current_gradient_accumulation_steps = 1  # train() sets it, which is not called here
        model.train()
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in made}
        batches = {name: trainer.get_train_dataloader() for name, trainer in made.items()}
        for pair in zip(*batches.values(), strict=True):
            for (name, trainer), batch in zip(made.items(), pair, strict=True):
                n_tokens = batch["input_ids"].numel()
                started = time.perf_counter()
                loss = trainer.training_step(model, batch)
                found[name].append((time.perf_counter() - started, float(loss), n_tokens))
                model.zero_grad()
    return found


def default_trainer(model: Any, tokenizer: Any, rows: list[TrainRow]) -> Any:
    """TRL's SFTTrainer as it comes, with labels on the answers."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [
            {
                "input_ids": [*row.prompt, *row.answer],
                "attention_mask": [1] * row.n_tokens,
                "labels": [-100] * len(row.prompt) + list(row.answer),
            }
            for row in rows
        ]
    )
    arguments = SFTConfig(
        output_dir="default",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=4096,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    return SFTTrainer(model=model, processing_class=tokenizer, args=arguments, train_dataset=dataset)


def show(
    kind: str,
    rows: list[TrainRow],
    found: dict[str, list[tuple[float, float, int]]],
    memory: dict[str, int],
) -> None:
    """One table. Steps beside each other have to have the same loss."""
    ratios = [other[0] / tree[0] for tree, other in zip(found["tree"], found["SFTTrainer"], strict=True)]
    worst = max(
        abs(other[1] - tree[1]) / tree[1]
        for tree, other in zip(found["tree"], found["SFTTrainer"], strict=True)
    )
    print(f"\n{kind}: {len(rows)} rows, {sum(row.n_tokens for row in rows)} tokens, {len(ratios)} steps")
    print("  contender   median s a step  min - max      tokens a step  peak memory")
    for name, measured in found.items():
        seconds = [step[0] for step in measured]
        tokens = statistics.mean(step[2] for step in measured)
        print(
            f"  {name:11} {statistics.median(seconds):15.2f}  {min(seconds):.2f} - {max(seconds):<8.2f}"
            f"{tokens:12.0f}  {memory[name]:8} MB"
        )
    ratio = statistics.median(ratios)
    verdict = "reached" if ratio >= GOALS[kind] else "MISSED"
    print(
        f"  ratio {ratio:.2f} (quartiles {' - '.join(f'{q:.2f}' for q in statistics.quantiles(ratios)[::2])}), "
        f"goal {GOALS[kind]}: {verdict}; losses differ by {worst:.1e} at most"
    )


if __name__ == "__main__":
    if importlib.util.find_spec("unsloth") is None:
        sys.exit("training needs the extra `train`")
    main()
