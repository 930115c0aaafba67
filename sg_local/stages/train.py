"""Stage 4: finetune the model on its own pairs (SELF-GUIDE, section 3.4; here LoRA).

reads  train.jsonl
writes adapter/adapter_config.json adapter/adapter_model.safetensors

The weights are those of the GGUF that is served, dequantized; the token ids are llama.cpp's.
"""

import math
import os
import sys
from collections import Counter
from contextlib import ExitStack

from sg_local.errors import SgLocalError
from sg_local.files import own_directory, place_directory, remove_tree
from sg_local.finetune.batches import TrainRow
from sg_local.finetune.checkpoints import remove_incomplete
from sg_local.finetune.environment import prepare_process, require_trainer
from sg_local.finetune.stand_in_tokenizer import Vocabulary
from sg_local.finetune.train import train_adapter
from sg_local.gguf_io.check_base import target_modules
from sg_local.llama.engine import room_advice
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.plan.machine import card_in_use
from sg_local.progress import progress, say
from sg_local.proof.working_copies import training_weights
from sg_local.report.tables import counted
from sg_local.runs.directory import Run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.rows import read_pairs
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.rows import is_kept


def run_train(run: Run) -> None:
    """Trains the adapter on the rows that curate kept, each as often as its `copies` say."""
    require_trainer(run.settings.trainer)
    with run.stage("train") as details:
        rows, dropped, vocabulary = _tokenized(run)
        settings, modules = run.settings, target_modules(run.base_header, run.settings)
        card = card_in_use()
        steps = settings.epochs * math.ceil(len(rows) / settings.batch_size)
        say(
            f"train: {counted(len(rows), 'row')}, {counted(settings.epochs, 'epoch')}, {counted(steps, 'step')}; "
            f"loading {settings.trainer}"
        )
        run_dir = run.path.resolve()  # the trainer works in another directory
        final, work, checkpoints = (run_dir / name for name in ("adapter", ".work", "checkpoints"))
        here = os.getcwd()
        # Code that others could write must not be imported from: the work directory begins empty.
        remove_tree(work)
        own_directory(checkpoints)
        remove_incomplete(checkpoints)
        try:
            with ExitStack() as until_loaded:
                weights_dir = until_loaded.enter_context(training_weights(run)).resolve()
                prepare_process(work, on_gpu=bool(card))
                said = [f"loading {settings.trainer}"]
                with progress("train", steps, "steps", detail=lambda: said[-1]) as advance:
                    details["training"] = train_adapter(
                        weights_dir,
                        vocabulary,
                        rows,
                        work / "adapter",
                        checkpoints,
                        run.model.sha256,
                        modules,
                        settings,
                        advance,
                        card=card,
                        on_loaded=until_loaded.close,
                        on_loss=lambda loss: said.append(f"loss {loss:.3f}"),
                    )
            place_directory(work / "adapter", final)
        finally:
            os.chdir(here)
            remove_tree(work)
            remove_incomplete(checkpoints)
        remove_tree(checkpoints)
        details["counts"] = {"rows": len(rows), "dropped": dict(dropped)}


def _tokenized(run: Run) -> tuple[list[TrainRow], Counter[str], Vocabulary]:
    """The kept rows as token ids, why others fell out, and the vocabulary for the stand-in tokenizer."""
    found: list[TrainRow] = []
    dropped: Counter[str] = Counter()
    shortest = sys.maxsize
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))
        limit = min(run.settings.n_ctx, model.n_ctx_train)
        for row in filter(is_kept, read_pairs(run)):
            # A demonstration is not shown above itself: its answer would stand in its own prompt.
            shown = [example for example in demonstrations(run) if example.input != row["input"]]
            messages = answer_messages(run.task.instruction, row["input"], shown)
            prompt = tuple(tokenizer.encode_prompt(template, messages))
            targets = row["targets"] or {row["output"]: 1.0}
            (answer, weight), *others = [
                (tuple(tokenizer.encode_answer(template, messages, text)), share)
                for text, share in targets.items()
                if share > 0
            ]
            item = TrainRow(prompt, answer, weight, tuple(others))
            shortest = min(shortest, item.n_tokens)
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
        advice = room_advice(shortest, run.settings.n_ctx, model.n_ctx_train)
        raise SgLocalError(f"no row of {run.file('train.jsonl')} fits {limit} tokens: {advice}")
    return found, dropped, vocabulary
