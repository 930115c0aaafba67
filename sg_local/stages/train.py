"""Stage 4: finetune the model on its own pairs (SELF-GUIDE, section 3.4; here LoRA).

reads  train.jsonl
writes adapter/adapter_config.json adapter/adapter_model.safetensors

The weights are those of the GGUF that is served, dequantized; the token ids are llama.cpp's.
"""

import math
import os
import shutil
from collections import Counter

from sg_local.errors import SgLocalError
from sg_local.finetune.process import prepare_process, require_training_packages
from sg_local.finetune.stand_in_tokenizer import Vocabulary
from sg_local.finetune.train import TrainRow, TrainSettings, train_adapter
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.progress import progress, say
from sg_local.records import read_rows
from sg_local.run import Run
from sg_local.selfguide.prompts import answer_messages
from sg_local.stages.common import demonstrations, template_source
from sg_local.stages.weights import torch_weights

ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def run_train(run: Run) -> None:
    """Trains the adapter on the rows that curate kept, each as often as its `copies` say."""
    run.require("train")
    require_training_packages()
    with run.stage("train", reads=["train.jsonl"], writes=list(ADAPTER_FILES)) as details:
        settings = run.settings
        rows, dropped, vocabulary = _tokenized(run)
        weights_dir = torch_weights(run).resolve()  # the trainer works in another directory
        steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
        say(f"train: {len(rows)} rows, {settings.epochs} epochs, {steps} steps; loading Unsloth")
        final = run.file("adapter").resolve()
        work = run.file(".work").resolve()
        here = os.getcwd()
        # Code that others could write must not be imported from: the work directory begins empty.
        shutil.rmtree(work, ignore_errors=True)
        prepare_process(work)
        try:
            with progress("train", steps, "steps") as advance:
                details["training"] = train_adapter(
                    weights_dir,
                    vocabulary,
                    rows,
                    work / "adapter",
                    TrainSettings(
                        rank=settings.rank,
                        alpha=settings.alpha,
                        learning_rate=settings.learning_rate,
                        epochs=settings.epochs,
                        batch_size=settings.batch_size,
                        load_in_4bit=settings.load_in_4bit,
                        n_threads=settings.n_threads,
                        seed=settings.seed,
                    ),
                    advance,
                )
        finally:
            os.chdir(here)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work / "adapter", final)
        shutil.rmtree(work, ignore_errors=True)
        details["counts"] = {"rows": len(rows), "dropped": dict(dropped)}


def _tokenized(run: Run) -> tuple[list[TrainRow], Counter[str], Vocabulary]:
    """The kept rows as token ids, why others fell out, and the vocabulary for the stand-in tokenizer."""
    found: list[TrainRow] = []
    dropped: Counter[str] = Counter()
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))
        limit = min(run.settings.n_ctx, model.n_ctx_train)
        for row in read_rows(run.file("train.jsonl")):
            if row["drop"] is not None:
                continue
            # A demonstration is not shown above itself: its answer would stand in its own prompt.
            shown = [example for example in demonstrations(run) if example.input != row["input"]]
            messages = answer_messages(run.task.instruction, row["input"], shown)
            item = TrainRow(
                tuple(tokenizer.encode_prompt(template, messages)),
                tuple(tokenizer.encode_answer(template, messages, row["output"])),
            )
            if item.n_tokens > limit:  # never cut: a cut answer teaches to stop in the middle
                dropped["over_context"] += 1
                continue
            found += [item] * row["copies"]
        vocabulary = Vocabulary(
            tokens=[tokenizer.text_of(token) for token in range(tokenizer.n_vocab)],
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )
    if not found:
        raise SgLocalError(f"no row of {run.file('train.jsonl')} fits {limit} tokens: raise --n-ctx")
    return found, dropped, vocabulary
