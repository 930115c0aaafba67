"""What stands for llama.cpp, torch and the writing of GGUFs, where the stages themselves are tried.

replace_sampling(monkeypatch)     generate and annotate get texts that depend on a request's seed and prompt alone
replace_training(monkeypatch)     train writes an adapter of a few bytes, and a checkpoint on the way
replace_export(monkeypatch)       export writes GGUFs of a few bytes; `Parity` says that they are right
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_run import HEADER, TENSORS
from gguf_bytes import tiny_gguf

import sg_local.finetune.environment as environment
import sg_local.stages.annotate as annotate
import sg_local.stages.export as export
import sg_local.stages.generate as generate
import sg_local.stages.train as train
from sg_local.files import write_bytes, write_text
from sg_local.finetune.batches import TrainRow
from sg_local.finetune.checkpoints import mark_complete, training_key
from sg_local.llama.generation import Completion, Request
from sg_local.proof.parity import Parity
from sg_local.runs.directory import Run

GOOD = Parity(
    max_logit_difference=0.01,
    adapter_effect=5.0,
    mean_kl_nats=0.001,
    base_mean_kl_nats=3.0,
    argmax_equal_share=1.0,
    merged_type="F16",
    n_prompts=4,
    n_positions=40,
)


def scores(prompt: str, labels: list[str]) -> list[float]:
    """Log-probabilities of two labels at most, other ones for another prompt: for ScriptedEngine."""
    return [-1.0 - sum(prompt.encode()) % 7, -1.0 - len(prompt) % 5][: len(labels)]


def replace_sampling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No llama.cpp: returns the prompts that annotate's samples were drawn for, as they come."""
    asked: list[str] = []

    def made_up(request: Request) -> Completion:
        """Five words that no other request gets: "Baka lopi nuso remo tila."."""
        digest = hashlib.sha256(f"{request.seed} {request.temperature} {request.prompt}".encode()).digest()
        syllables = [f"{'bdfgklmnprstvz'[byte % 14]}{'aeiou'[byte // 14 % 5]}" for byte in digest]
        words = ["".join(syllables[start : start + 2]) for start in range(0, 10, 2)]
        return Completion(" ".join(words).capitalize() + ".", (1,), "end")

    def make(_engine: Any, requests: Sequence[Request], *_: Any) -> list[Completion]:
        return [made_up(request) for request in requests]

    def sample(
        _engine: Any, requests: Sequence[Request], on_finished: Callable[[int], None]
    ) -> list[Completion]:
        for number, request in enumerate(requests):
            asked.append(bytes(request.prompt).decode())
            on_finished(number)
        return make(None, requests)

    def logprobs(_engine: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        return [-float(sum(answer) % 97) - len(prompt) % 7 for prompt, answer in pairs]

    monkeypatch.setattr(generate, "generate", make)
    monkeypatch.setattr(annotate, "generate", sample)
    monkeypatch.setattr(annotate, "answer_logprobs", logprobs)
    return asked


def replace_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch: `train_adapter` writes its files, rows as they are in train.jsonl."""

    def tokenized(run: Run) -> tuple[list[TrainRow], "Counter[str]", None]:
        return [TrainRow((1, 2), (len(run.file("train.jsonl").read_bytes()),))], Counter(), None

    def prepare_process(work: Path, *, on_gpu: bool) -> None:
        del on_gpu
        work.mkdir(parents=True, exist_ok=True)
        os.chdir(work)

    def train_adapter(
        _weights: Path, _vocabulary: None, rows: Any, adapter_dir: Path, checkpoints: Path, *_: Any, **__: Any
    ) -> dict[str, object]:
        key = training_key([len(rows)])
        checkpoint = checkpoints / "checkpoint-1"
        checkpoint.mkdir(exist_ok=True)
        write_bytes(checkpoint / "optimizer.pt", b"moments")
        mark_complete(checkpoint, key)
        adapter_dir.mkdir(parents=True)
        write_text(adapter_dir / "adapter_config.json", "{}\n")
        write_bytes(adapter_dir / "adapter_model.safetensors", repr(rows).encode())
        return {"steps": 1}

    monkeypatch.setattr(train, "require_trainer", lambda _trainer: None)
    monkeypatch.setattr(train, "_tokenized", tokenized)
    monkeypatch.setattr(train, "training_weights", lambda run: nullcontext(run.path))
    monkeypatch.setattr(train, "prepare_process", prepare_process)
    monkeypatch.setattr(train, "train_adapter", train_adapter)


def replace_export(monkeypatch: pytest.MonkeyPatch, parity: Parity = GOOD) -> None:
    """No torch and no llama.cpp: the exported files are their inputs' bytes."""

    def write_adapter(adapter_dir: Path, _base: Path, path: Path, metadata: dict[str, str]) -> None:
        weights = (adapter_dir / "adapter_model.safetensors").read_bytes()
        digest = hashlib.sha256(weights + json.dumps(metadata).encode()).hexdigest()
        write_bytes(path, tiny_gguf({**HEADER, "general.description": digest}, TENSORS))

    def merge(base: Path, adapter: Path, path: Path, **_options: Any) -> None:
        write_bytes(path, base.read_bytes() + adapter.read_bytes())

    monkeypatch.setattr(environment, "require_training_packages", lambda _names: None)
    monkeypatch.setattr(export, "require_base", lambda *_: None)
    monkeypatch.setattr(export, "write_adapter_gguf", write_adapter)
    monkeypatch.setattr(export, "merge_gguf", merge)
    monkeypatch.setattr(
        export, "_chat_files", lambda run: ("{{ messages }}", f"FROM ./model.gguf\n# {run.task.name}\n")
    )
    trained = SimpleNamespace(compare=lambda _merged: parity)
    monkeypatch.setattr(export, "trained_in_run", lambda *_: trained)
    monkeypatch.setattr(export, "trained_on_texts", lambda *_: trained)


def make_calls_small(monkeypatch: pytest.MonkeyPatch, n_rows: int, n_trials: int) -> None:
    """Has generate and annotate work on a few rows in a call, so that a tiny run has several calls."""
    monkeypatch.setattr(generate, "ROWS_PER_CALL", n_rows)
    monkeypatch.setattr(generate, "N_TRIALS", n_trials)
    monkeypatch.setattr(annotate, "QUESTIONS_PER_CALL", n_rows)
    monkeypatch.setattr(annotate, "SAMPLED_INPUTS_PER_CALL", n_rows)
