"""Commands whose child works with llama.cpp itself, on a model of a few kilobytes: how they answer, and end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, in_a_process, in_a_shell
from messages import assert_says
from tiny_models import TOKENS, write_tiny_llama

TASK = """name = "inbox"
instruction = "Which box is this message for?"
labels = ["refund", "login"]

[[examples]]
input = "I want my money back."
output = "refund"
"""


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "inbox.toml"
    path.write_text(TASK)
    return path


@pytest.fixture
def deadly(tmp_path: Path) -> Path:
    """A model whose header is right, and whose vocabulary ends llama.cpp: it has no tokens for single bytes."""
    tokens = [token.replace("<0x", "<byte ") for token in TOKENS]
    return write_tiny_llama(tmp_path / "deadly.gguf", vocabulary={"tokenizer.ggml.tokens": tokens})


VICUNA = ("--prompt-format=vicuna", "--n-ctx=512")


def error_line(result: "subprocess.CompletedProcess[str]") -> str:
    """The one error of a command; what it said before is how far it came."""
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    (line,) = [
        line
        for line in result.stderr.splitlines()
        if "on the processor" not in line and " inputs" not in line
    ]
    assert line.startswith("Error: ")
    return line


def test_a_model_that_ends_llama_cpp_is_an_error_of_predict(deadly: Path, task: Path) -> None:
    result = in_a_process("predict", "--model", deadly, "--task", task, *VICUNA, "-", input="one a\n")
    assert_says(
        error_line(result), "predict", "SIGABRT", deadly, "unordered_map::at", "another copy", "doctor"
    )


def test_a_model_that_ends_llama_cpp_is_an_error_of_run_and_of_a_stage(
    deadly: Path, task: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "deadly run"
    result = in_a_process("run", task, "--model", deadly, "--run", run_dir, *VICUNA, "--until=generate")
    assert result.returncode == 1
    assert_says(
        result.stderr.splitlines()[-1], "Error: generate was ended by SIGABRT", deadly, "unordered_map::at"
    )
    result = in_a_process("generate", run_dir)
    assert_says(error_line(result), "generate was ended by SIGABRT", deadly, "unordered_map::at", "doctor")


@pytest.mark.skipif(os.name == "nt", reason="a shell closes them")
def test_predict_with_closed_streams(task: Path, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    command = f'"{sys.executable}" -P -m sg_local predict --model "{model}" --task "{task}" {" ".join(VICUNA)} "{task}"'
    done = in_a_shell(f"{command} 2>&-", PYTHONPATH=str(ROOT))
    assert done.returncode == 0
    assert [json.loads(line)["input"] for line in done.stdout.splitlines()] == [
        line for line in task.read_text().splitlines() if line
    ]
    done = in_a_shell(f"{command} >&-", PYTHONPATH=str(ROOT))
    assert "Traceback" not in done.stderr


def test_answers_come_from_the_child(task: Path, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny.gguf")
    arguments = ("predict", "--model", model, "--task", task, *VICUNA, "--max-new-tokens=3", "-")
    result = in_a_process(*arguments, input="one a\n\ntwo b\n")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["input"] for row in rows] == ["one a", "two b"]
    assert all(isinstance(row["output"], str) for row in rows)
    assert "predict: 2 inputs" in result.stderr
