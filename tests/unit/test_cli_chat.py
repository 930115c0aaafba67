"""`sg-local chat`: lines in, answers out, base and tuned model beside each other. No model runs."""

from pathlib import Path

import pytest
from command_line import Call, one_line
from messages import assert_says
from scripted_engine import ScriptedEngine

from sg_local.runs.directory import Run


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """Answers with the file that answers, and the prompt's last word."""
    scripted = ScriptedEngine(lambda file, prompt: f"{file} {prompt.split()[-1]}\x1b")
    scripted.replace_llama_cpp(monkeypatch)
    return scripted


def test_each_line_is_an_input_of_its_own(sg: Call, engine: ScriptedEngine, finished_run: Run) -> None:
    for model in (finished_run.path, finished_run.file("model.gguf")):
        engine.asked.clear()
        result = sg("chat", model, input="one a\n\n  two b \n")
        assert (result.exit_code, result.stdout) == (0, "model.gguf a\\x1b\nmodel.gguf b\\x1b\n"), (
            result.stderr
        )
        assert [prompt.splitlines()[-1] for prompt in engine.asked] == ["one a", "two b"]
        assert not any("money back" in prompt for prompt in engine.asked)
    assert len(engine.opened) == 2  # once for each call


def test_the_base_is_shown_the_examples_and_stands_beside(
    sg: Call, engine: ScriptedEngine, finished_run: Run
) -> None:
    engine.answer = lambda _file, prompt: "few-shot" if "I want my money back." in prompt else "as trained"
    result = sg("chat", finished_run.path, "--compare", input="one a\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == ["base   few-shot", "tuned  as trained"]
    assert [model for model, *_ in engine.opened] == ["tiny.gguf", "model.gguf"]


def test_a_line_that_is_too_long_ends_nothing(sg: Call, engine: ScriptedEngine, finished_run: Run) -> None:
    result = sg("chat", finished_run.path, input=f"{'x' * 300}\none a\n")
    assert (result.exit_code, result.stdout) == (0, "model.gguf a\\x1b\n")
    assert_says(result.stderr, "tuned:", "context")


def test_only_a_run_knows_its_base(sg: Call, engine: ScriptedEngine, finished_run: Run) -> None:
    line = one_line(sg("chat", finished_run.file("model.gguf"), "--compare", input=""), 2)
    assert_says(line, "model.gguf", "run")


def test_a_base_needs_a_task(sg: Call, engine: ScriptedEngine, model: Path, task: Path) -> None:
    assert "--task" in one_line(sg("chat", model, input=""), 2)
    result = sg("chat", model, "--task", task, input="one a\n")
    assert result.stdout == "tiny.gguf a\\x1b\n"
