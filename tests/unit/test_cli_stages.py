"""One stage by its own command: `sg-local annotate RUN` and the like."""

from pathlib import Path

import pytest
from command_line import Call, Contents, one_line
from messages import assert_says
from scripted_engine import ScriptedEngine

from sg_local.files import write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.settings import Settings
from sg_local.task import load_task


@pytest.mark.usefixtures("without_torch")
def test_train_without_torch_leaves_the_run_as_it_was(
    sg: Call, finished_run: Run, contents: Contents
) -> None:
    write_rows(finished_run.file("train.jsonl"), [{"id": 0, "input": "a", "output": "login", "drop": None}])
    before = contents(finished_run.path)
    assert "training needs torch" in one_line(sg("train", finished_run.path), 2)
    assert contents(finished_run.path) == before
    # a finished run needs no torch
    assert sg("curate", finished_run.path).exit_code == 0


def test_a_stage_of_no_run(sg: Call, tmp_path: Path) -> None:
    line = one_line(sg("annotate", tmp_path), 2)
    assert f"`sg-local run TASK --run {tmp_path}`" in line


def test_a_stage_before_its_turn(sg: Call, new_run: Run, contents: Contents) -> None:
    before = contents(new_run.path)
    line = one_line(sg("annotate", new_run.path), 2)
    assert_says(line, "generate is not finished", f"`sg-local generate {new_run.path}`")
    assert contents(new_run.path) == before


def test_a_finished_stage_says_so(sg: Call, finished_run: Run, contents: Contents) -> None:
    before = contents(finished_run.path)
    result = sg("train", finished_run.path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert_says(result.stderr, "is finished", "--redo")
    result = sg("evaluate", finished_run.path)
    assert "tuned_merged" in result.stdout
    assert contents(finished_run.path) == before


def test_a_prompt_without_room_for_any_input_ends_generate_before_its_first_row(
    sg: Call, tmp_path: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScriptedEngine().replace_llama_cpp(monkeypatch)
    task.write_text(task.read_text().replace("Which box", "Which box " * 20))
    run, _ = create_or_open_run(tmp_path / "run", load_task(task), model, Settings())
    result = sg("generate", run.path)
    assert result.exit_code == 2
    assert_says(result.stderr, "context of 200 tokens", "--n-ctx", "shorten")
    assert not run.file("inputs.jsonl").exists()
