"""Native code that ends its process costs the stage's process, and at most the row that does it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished_run import write_inputs
from tiny_models import write_tiny_llama

from sg_local.files import read_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.settings import Settings
from sg_local.task import load_task

ROOT = Path(__file__).parents[2]
N_ROWS = 30

# As llama.cpp would: the process ends by a signal in the middle of a call, wherever the prompt holds the word.
PLANTED = """
import os, signal, sys
if any(argument.endswith("child.py") for argument in sys.orig_argv):  # a stage, not the process that started it
    import sg_local.llama.generation as generation
    whole = generation.generate
    def generate(engine, requests, on_finished=None):
        for request in requests:
            text = b"".join(map(engine.tokenizer.piece_bytes, request.prompt))
            if os.environ["CRASH_ON"].encode() in text:
                os.kill(os.getpid(), signal.SIGSEGV)
        return whole(engine, requests, on_finished)
    generation.generate = generate
"""

TASK = """
name = "shout"
instruction = "Say it louder."

[[examples]]
input = "abc"
output = "ABC"
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with inputs, of which one has the word "boom", and nothing after them."""
    (tmp_path / "task.toml").write_text(TASK)
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    settings = Settings(prompt_format="vicuna", n_samples=2, max_new_tokens=3, n_ctx=512)
    run, _ = create_or_open_run(tmp_path / "run", load_task(str(tmp_path / "task.toml")), model, settings)
    texts = ["boom" if number == 26 else f"abc {number}" for number in range(N_ROWS)]
    write_inputs(run, [{"id": number + 100, "input": text} for number, text in enumerate(texts)])
    return run


def annotate(run: Run, tmp_path: Path, crash_on: str) -> "subprocess.CompletedProcess[str]":
    settings = ["--prompt-format=vicuna", "--n-samples=2", "--max-new-tokens=3", "--n-ctx=512"]
    return sg_run(tmp_path, run.model.path, "annotate", crash_on, settings)


def sg_run(
    tmp_path: Path, model: Path, until: str, crash_on: str, settings: list[str]
) -> "subprocess.CompletedProcess[str]":
    """`sg-local run` on task.toml with a planted crash, up to a stage."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    command = [sys.executable, "-m", "sg_local", "run", str(tmp_path / "task.toml"), f"--until={until}"]
    return subprocess.run(
        [*command, "--model", str(model), "--run", str(tmp_path / "run"), *settings],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "CRASH_ON": crash_on,
            "SG_LOCAL_HOME": str(tmp_path / "store"),
        },
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_a_row_that_crashes_llama_cpp_twice_is_dropped_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    result = annotate(run, tmp_path, "boom")
    assert result.returncode == 0, result.stderr
    assert "annotate was ended by SIGSEGV with the rows 124..129 in flight" in result.stderr
    assert "annotate was ended by SIGSEGV on row 126" in result.stderr
    rows = read_rows(run.file("outputs.jsonl"))
    assert [row["id"] for row in rows] == list(range(100, 100 + N_ROWS))
    assert [row["id"] for row in rows if row["drop"] == "crash"] == [126]
    assert open_run(run.path).is_finished("annotate")
    assert not run.file(".in_flight.json").exists()


def test_where_every_row_crashes_the_run_stops_and_is_kept(run: Run, tmp_path: Path) -> None:
    result = annotate(run, tmp_path, "louder")
    assert result.returncode == 1
    assert "goes on with annotate" in result.stderr
    assert result.stderr.count("was ended by SIGSEGV") == 7  # six tries told, and the error
    assert open_run(run.path).is_finished("generate")
    result = annotate(run, tmp_path, "never said")
    assert result.returncode == 0, result.stderr
    # the first crash was of all rows in flight, the five after it of one row each; the others are answered now
    assert [row["drop"] for row in read_rows(run.file("outputs.jsonl"))].count("crash") == 5


def test_a_crash_in_a_trial_costs_one_trial_input(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(26)] + ["boom", "label 27"]
    (tmp_path / "task.toml").write_text(
        f'name = "many"\ninstruction = "Sort."\nlabels = {labels}\n\n'
        '[[examples]]\ninput = "abc"\noutput = "label 0"\n'
    )
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    settings = ["--prompt-format=vicuna", "--n-inputs=1", "--max-input-tokens=4", "--n-ctx=1024"]
    result = sg_run(tmp_path, model, "generate", "new example of: boom", settings)
    assert "generate was ended by SIGSEGV with the rows 0..31 in flight" in result.stderr
    assert "generate was ended by SIGSEGV on row 26" in result.stderr
    trials = read_rows(tmp_path / "run" / ".probe.jsonl")
    assert [(trial["style"], trial["made"]) for trial in trials] == [
        ("meta", 32),
        ("turns", 32),
        ("list", 32),
    ]
    assert "generate: asking by" in result.stderr
