"""The whole loop with a tiny random model of each architecture, all six stages; killed, and called again.

    gemma3, 2 layers, 8 real inputs -> adapter.gguf, model.gguf: llama.cpp within 0.003 of torch, logits moved by 4.8

`run` is called as Python has it. Its stages work in this process, one after the other, so that torch is imported once
and not twenty times; the two runs that are killed are the command's, with their processes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_model

import sg_local
from sg_local.architectures import ARCHITECTURES
from sg_local.files import read_rows, sha256_file
from sg_local.finetune.environment import go_offline
from sg_local.gguf_header import read_header
from sg_local.runs import process
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings

for package in ("llama_cpp", "torch", "transformers", "peft", "trl"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
TASK = """
name = "tiny"
instruction = "Say a or b."
labels = ["a", "b"]
test = "tiny.test.jsonl"
inputs = "tiny.txt"
examples = [{input = "the cat sings", output = "a"}, {input = "an ape sings", output = "b"}]
"""
WORDS = ("house", "garden", "river", "winter", "summer", "forest", "village", "kitchen")
N_GIVEN, N_TEST_ROWS = len(WORDS), 4
SETTINGS: dict[str, Any] = {
    "n_inputs": N_GIVEN + 1,  # one is to be made; what random weights make seldom passes the filters
    "input_prompt": "turns",
    "max_input_tokens": 16,
    "n_ctx": 512,
    "n_parallel": 8,
    "n_threads": 1,
    "batch_size": 4,
    "rank": 4,
    "learning_rate": 0.01,
    "epochs": 2,
    "checkpoint_seconds": 0,  # after each step
    "trainer": "peft",
    "prompt_format": "vicuna",
}
# What the architectures have of their own: a window that is shorter than the rows, layers without attention.
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"metadata": {"attention.sliding_window": 16}},
    "gemma3": {
        "metadata": {"attention.sliding_window": 16, "attention.sliding_window_pattern": 2},
        "tied": True,
    },
    "smollm3": {"n_layers": 4},
    "lfm2": {"n_layers": 3},
}
FILES = ("adapter/adapter_model.safetensors", "adapter.gguf", "model.gguf", "Modelfile", "train.jsonl")

# Ends the command, which ends the process of its stage, when that has called a function.
PLANTED = """
import os, signal, sys, time
if any(argument.endswith("child.py") for argument in sys.orig_argv):
    from importlib import import_module
    module = import_module(os.environ["KILL_IN"])
    name = os.environ["KILL_AFTER"]
    whole = getattr(module, name)
    def planted(*arguments, **options):
        whole(*arguments, **options)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    setattr(module, name, planted)
"""
# Of those that are not like llama (test_training.py kills that), one with windows and one with convolutions.
KILLS = {
    "gemma3": ("export", "sg_local.gguf_io.merge", "merge_gguf"),
    "lfm2": ("train", "sg_local.finetune.checkpoints", "mark_complete"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    go_offline()
    home = tmp_path_factory.mktemp("each")
    (home / "tiny.toml").write_text(TASK)
    (home / "tiny.txt").write_text("".join(f"a {word} sings in the {word}\n" for word in WORDS))
    rows = [{"input": f"the bird {number}", "output": "ab"[number % 2]} for number in range(N_TEST_ROWS)]
    (home / "tiny.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def stage_here(run: Run, stage: str) -> int:
    run_stage(open_run(run.path).with_given({name: SETTINGS[name] for name in run.given}), stage)
    return 0


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def finished(request: pytest.FixtureRequest, home: Path) -> Path:
    """The directory of a finished run."""
    name = request.param
    model = write_tiny_model(home / f"{name}.gguf", name, **OWN.get(name, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SG_LOCAL_HOME", str(home / "store"))
        patch.setattr(process, "in_child_process", stage_here)
        result = sg_local.run(
            home / "tiny.toml", model=model, settings=Settings(**SETTINGS), run_dir=home / name
        )
    return result.directory


def test_it_ends_with_files_that_are_the_trained_model(finished: Path) -> None:
    run = open_run(finished)
    assert run.first_unfinished(STAGES[-1]) is None
    assert run.base_header.architecture == finished.name
    stages = run.manifest()["stages"]
    training, parity = stages["train"]["training"], stages["export"]["parity"]
    assert training["last_loss"] < training["first_loss"]
    assert parity["max_logit_difference"] < 0.1 < parity["adapter_effect"]
    assert parity["argmax_equal_share"] == 1
    assert stages["generate"]["counts"]["made"] > 0
    assert stages["generate"]["counts"]["kept"] >= N_GIVEN

    base, merged = (read_header(path) for path in (run.model.path, finished / "model.gguf"))
    assert [tensor.name for tensor in merged.tensors] == [tensor.name for tensor in base.tensors]
    assert read_header(finished / "adapter.gguf").architecture == finished.name
    # llama.cpp has loaded both: these answers are theirs.
    adapter, whole = (
        [row["prediction"] for row in read_rows(finished / "predictions" / f"{name}.jsonl")]
        for name in ("tuned_adapter", "tuned_merged")
    )
    assert len(adapter) == N_TEST_ROWS
    assert adapter == whole


@pytest.mark.parametrize("finished", KILLS, indirect=True)
def test_killed_and_called_again_it_ends_with_the_same_files(finished: Path, home: Path) -> None:
    stage, module, function = KILLS[finished.name]
    killed, unbroken = (home / f"{finished.name}-{name}" for name in ("killed", "unbroken"))
    for run in (killed, unbroken):
        shutil.copytree(finished, run)
        open_run(run).forget_from(stage, keep_partial=False)
    # Not the run of this process: what other tests have left in its torch may move the last bits of a training.
    undisturbed = command(unbroken, home)
    assert undisturbed.returncode == 0, undisturbed.stderr
    (home / "sitecustomize.py").write_text(PLANTED)
    plant = {"KILL_IN": module, "KILL_AFTER": function, "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])}

    first = command(killed, home, plant)
    assert first.returncode == -9, first.stderr
    unfinished = open_run(killed).first_unfinished(STAGES[-1])
    assert unfinished is not None
    assert unfinished.stage == stage
    again = command(killed, home)
    assert again.returncode == 0, again.stderr
    assert ("going on from checkpoint-1" in again.stderr) == (stage == "train")
    for name in FILES:
        assert sha256_file(killed / name) == sha256_file(unbroken / name), name
    scores = [json.loads((run / "evaluation.json").read_text())["contenders"] for run in (killed, unbroken)]
    assert scores[0] == scores[1]


def command(run: Path, home: Path, extra: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """`sg-local run`, called again for a run that has its settings."""
    arguments = ["run", "tiny.toml", f"--model={open_run(run).model.path}", f"--run={run}"]
    arguments += [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    return subprocess.run(
        [sys.executable, "-m", "sg_local", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SG_LOCAL_HOME": str(home / "store"), **(extra or {})},
        text=True, capture_output=True, cwd=home, timeout=900, check=False,
    )  # fmt: skip
