"""A store of its own for every test, and a run with its files, made without any model being loaded.

finished_run/ task.toml test.jsonl settings.toml inputs.jsonl ... adapter.gguf model.gguf evaluation.json
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gguf_bytes import TinyTensor, Value, tiny_gguf
from hypothesis import settings as hypothesis_settings

import sg_local.finetune.environment as environment
from sg_local.cli import cli
from sg_local.files import write_rows
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.run.directory import Run, create_or_open_run
from sg_local.settings import Settings
from sg_local.task import load_task

# A busy machine is no fault; tests that are about time say their own deadline.
hypothesis_settings.register_profile("no deadline", deadline=None)
hypothesis_settings.load_profile("no deadline")

MODEL: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.context_length": 128,
    "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}
TENSORS = [TinyTensor("token_embd.weight", (32, 2))]

TASK = """name = "inbox"
instruction = "Which box is this message for?"
labels = ["refund", "login"]
test = "inbox.test.jsonl"

[[examples]]
input = "I want my money back."
output = "refund"
"""
TEST_ROWS = [{"input": "My password is wrong.", "output": "login"}, {"input": "Pay me.", "output": "refund"}]


@pytest.fixture(autouse=True)
def own_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty store, and an empty directory to work in."""
    place = tmp_path_factory.mktemp("place")
    monkeypatch.setenv("SG_LOCAL_HOME", str(place / "home"))
    (place / "work").mkdir()
    monkeypatch.chdir(place / "work")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that passes for a llama model as long as nobody computes with it."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf(MODEL, TENSORS))
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file with two test rows."""
    path = tmp_path / "inbox.toml"
    path.write_text(TASK)
    write_rows(tmp_path / "inbox.test.jsonl", TEST_ROWS)
    return path


@pytest.fixture
def sg() -> Callable[..., Result]:
    """Calls the command line in this process: sg("run", task, "--model", model).exit_code."""

    def call(*arguments: object, **options: Any) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)

    return call


@pytest.fixture
def new_run(tmp_path: Path, task: Path, model: Path) -> Run:
    """A run that was begun with --n-inputs 7, and no stage of it."""
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings(n_inputs=7))
    return run


@pytest.fixture
def finished_run(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same, every stage finished: tuned +0.5 over the base."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)  # a slow disk is not what is tested
        _finish(new_run)
    return new_run


@pytest.fixture
def finish(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """finish(run): every stage of it, as in finished_run."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    return _finish


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for an `nvidia-smi`, the only program there is."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin" / "nvidia-smi"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "torch" else find_spec(name))


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """contents(directory): every file in it and its bytes, but for the lock."""

    def read(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return read


def _finish(run: Run) -> None:
    """Writes what the stages write, through the same `Run.stage`."""
    exported = {
        **MODEL,
        "sg_local.base_fingerprint": fingerprint(run.model.path),
        "sg_local.task": json.dumps(_carried_task(run)),
    }
    with run.stage("generate", reads=["task.toml"], writes=["inputs.jsonl"]):
        write_rows(
            run.file("inputs.jsonl"), [{"id": 0, "input": "Log me in.", "label": "login", "drop": None}]
        )
    with run.stage("annotate", reads=["inputs.jsonl"], writes=["outputs.jsonl"]):
        write_rows(run.file("outputs.jsonl"), [{"id": 0, "output": "login", "drop": None}])
    with run.stage("curate", reads=["inputs.jsonl", "outputs.jsonl"], writes=["train.jsonl"]):
        write_rows(
            run.file("train.jsonl"), [{"id": 0, "input": "Log me in.", "output": "login", "drop": None}]
        )
    with run.stage("train", reads=["train.jsonl"], writes=["adapter/adapter_config.json"]):
        run.file("adapter").mkdir(exist_ok=True)
        run.file("adapter/adapter_config.json").write_text("{}")
    with run.stage(
        "export", reads=["adapter/adapter_config.json"], writes=["adapter.gguf", "model.gguf", "Modelfile"]
    ):
        run.file("adapter.gguf").write_bytes(tiny_gguf({**exported, "general.type": "adapter"}, TENSORS))
        run.file("model.gguf").write_bytes(tiny_gguf(exported, TENSORS))
        run.file("Modelfile").write_text("FROM ./model.gguf\n")
    with run.stage(
        "evaluate",
        reads=["test.jsonl", "adapter.gguf", "model.gguf"],
        writes=["evaluation.json", "predictions/tuned_merged.jsonl"],
    ):
        run.file("predictions").mkdir(exist_ok=True)
        write_rows(run.file("predictions/tuned_merged.jsonl"), [{"input": "Pay me.", "prediction": "refund"}])
        run.file("evaluation.json").write_text(json.dumps(_evaluation(run)))


def _carried_task(run: Run) -> dict[str, Any]:
    """What export writes into a tuned GGUF."""
    return {
        "name": run.task.name,
        "instruction": run.task.instruction,
        "labels": list(run.task.labels),
        "examples": [],
        "max_new_tokens": 9,
        "prompt_format": "gguf",
    }


def _evaluation(run: Run) -> dict[str, Any]:
    """The content of evaluation.json, as far as it is shown."""
    scores = {"mean": 0.5, "interval_95": [0.1, 0.9]}
    entry: dict[str, Any] = {"exact_match": scores, "rouge_l": scores}
    names = ["base_zero_shot", "base_few_shot", "tuned_adapter", "tuned_merged"]
    gain = {"of": "tuned_merged", "mean": 0.5, "interval_95": [0.2, 0.8], "p": 0.001, "verdict": "better"}
    gains = {"gain": {**gain, "over": "base_few_shot"}}
    if run.task.is_classification:
        entry |= {"no_label_share": 0.0, "label_distance": 0.1}
        names.insert(2, "base_label_scoring")
        gains["gain_over_label_scoring"] = {**gain, "over": "base_label_scoring", "mean": 0.25}
    gains["gain_over_best"] = gains.get("gain_over_label_scoring", gains["gain"])
    return {
        "task": run.task.name,
        "metric": run.task.metric,
        "n_rows": 2,
        "rows_from": "the task's test file",
        "contenders": dict.fromkeys(names, entry),
        **gains,
    }
