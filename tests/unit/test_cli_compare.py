"""`sg-local compare RUN RUN`: what differs, whether the scores compare, and what is not believed."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, Contents, one_line
from finished_run import ScriptedStages, write_stage, write_train_rows
from messages import assert_says

from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import TUNED
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task


def finish(run: Run, n_right: int) -> None:
    """Every stage; the tuned model has so many of 40 rows right."""
    for stage in STAGES:
        write_stage(run, stage, right={TUNED: n_right}, n_rows=40)


@pytest.fixture
def first(new_run: Run) -> Run:
    finish(new_run, 20)
    return new_run


@pytest.fixture
def second(first: Run, task: Path, model: Path, tmp_path: Path) -> Run:
    run, _ = create_or_open_run(tmp_path / "second", load_task(task), model, Settings(n_inputs=7, epochs=5))
    finish(run, 30)
    return run


@pytest.fixture
def compared(sg: Call, first: Run, second: Run) -> Any:
    def call() -> dict[str, Any]:
        result = sg("compare", first.path, second.path, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return call


def test_what_differs_and_a_paired_test(compared: Any, first: Run, second: Run) -> None:
    found = compared()
    assert found["runs"] == [str(first.path), str(second.path)]
    assert found["settings"] == {"epochs": [3, 5]}
    assert (found["task"], found["model"], found["given_rows"], found["notes"]) == ({}, {}, [], [])
    assert found["same_stages"] == [*STAGES[:5]]  # the scripted stages write the same
    assert found["data"]["in training"] == [1, 1]
    assert found["n_test_rows"] == [40, 40]
    assert found["difference"]["mean"] == 0.25
    assert found["difference"]["verdict"] == "better"
    assert found["difference"]["p"] == pytest.approx(2 / 2**10, rel=1e-2)  # ten rows differ, all to one side


def test_the_other_way_round_it_is_worse(sg: Call, first: Run, second: Run, contents: Contents) -> None:
    before = contents(first.path), contents(second.path)
    result = sg("compare", second.path, first.path)
    assert result.exit_code == 0
    assert_says(result.stdout, "task: the same", "epochs", "-0.250", "worse", "same 40 test rows")
    assert (contents(first.path), contents(second.path)) == before


def test_fields_of_json_are_compared_beside_the_metric(
    sg: Call, compared: Any, first: Run, second: Run
) -> None:
    assert compared()["field_scores"] == {}
    for run, share in ((first, 0.25), (second, 0.75)):
        evaluation = json.loads(run.file("evaluation.json").read_text())
        for scores in evaluation["contenders"].values():
            scores["all_fields_right"] = {"mean": share, "interval_95": [0.1, 0.9]}
        with run.stage("evaluate"):
            run.file("evaluation.json").write_text(json.dumps(evaluation))
    assert compared()["field_scores"]["all_fields_right"][TUNED] == [0.25, 0.75]
    assert_says(sg("compare", first.path, second.path).stdout, "all fields right", "0.250", "0.750")


def test_rows_that_differ_are_counted(compared: Any, second: Run) -> None:
    rows = [
        {"id": 0, "input": "a", "output": "login", "copies": 3},
        {"id": 1, "input": "b", "output": "refund"},
        {"id": 2, "input": "c", "output": "refund", "drop": "low_confidence"},
    ]
    write_train_rows(second, rows)
    found = compared()
    assert found["data"]["in training"] == [1, 2]
    assert found["data"]["with repetitions"] == [1, 4]
    assert found["labels"] == {"login": [1, 3], "refund": [None, 1]}
    assert found["dropped"] == {"low_confidence": [None, 1]}
    assert found["same_stages"] == ["generate", "annotate"]
    # the stages after it are not finished any more, and their scores are of other rows
    assert found["scores"]["tuned_merged"][1] is None
    assert found["difference"] is None
    assert f"{second.path}: train is not finished" in found["notes"]


def test_other_test_rows_do_not_compare(compared: Any, second: Run) -> None:
    write_stage(second, "evaluate", "Another message.", n_rows=40)
    found = compared()
    assert found["difference"] is None
    assert any("test rows are not the same" in note for note in found["notes"])


def test_another_task_and_model_are_named(
    sg: Call, first: Run, task: Path, model: Path, tmp_path: Path
) -> None:
    task.write_text(task.read_text().replace("Which box", "Which big box"))
    model.write_bytes(model.read_bytes() + bytes(32))
    other, _ = create_or_open_run(tmp_path / "other", load_task(task), model, Settings(n_inputs=7))
    found = json.loads(sg("compare", first.path, other.path, "--json").stdout)
    assert [*found["task"]] == ["instruction"]
    assert [*found["model"]] == ["sha256"]
    assert found["scores"]["tuned_merged"] == [0.5, None]
    assert found["difference"] is None


@pytest.mark.parametrize("name", ["evaluation.json", "predictions/tuned_merged.jsonl", "adapter.gguf"])
def test_scores_of_files_that_were_changed_are_not_shown(compared: Any, second: Run, name: str) -> None:
    path = second.file(name)
    path.write_bytes(path.read_bytes().replace(b"refund", b"login ").replace(b"0.5", b"0.9") + b"\n")
    found = compared()
    assert found["difference"] is None
    assert found["scores"]["tuned_merged"][1] is None
    assert any(f"{name} is not as it was written" in note for note in found["notes"])


def test_rows_that_a_person_edited_are_told(compared: Any, second: Run) -> None:
    path = second.file("inputs.jsonl")
    path.write_text(path.read_text().replace("Log me in.", "Let me in."))
    notes = compared()["notes"]
    assert any("inputs.jsonl was edited after generate" in note for note in notes)
    assert any("annotate is out of date" in note for note in notes)


def test_from_where_stages_came_is_told(sg: Call, first: Run, task: Path, stages: ScriptedStages) -> None:
    assert sg("run", task, "--from", first.path, "--epochs=5").exit_code == 0
    new = first.path.with_name("run-epochs=5")
    found = json.loads(sg("compare", first.path, new, "--json").stdout)
    assert f"{new}: generate, annotate, curate came from {first.path.resolve()}" in found["notes"]
    assert found["same_stages"][:3] == ["generate", "annotate", "curate"]


def test_what_is_no_run_is_refused(sg: Call, first: Run, tmp_path: Path) -> None:
    assert_says(
        one_line(sg("compare", first.path, tmp_path / "gone"), 2), tmp_path / "gone", "no run directory"
    )
