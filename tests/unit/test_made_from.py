"""What was made from something that changed since is made again; the rest stays."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from stand_ins import make_calls_small, replace_export, replace_sampling, replace_training, scores

from sg_local.files import read_rows, write_rows, write_text
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.second_try import _take_base_answers
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task

Edit = Callable[[list[dict[str, Any]]], object]

FREE_TASK = """name = "names"
instruction = "Name it."

[[examples]]
input = "I want my money back."
output = "Refund it now."
"""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    make_calls_small(monkeypatch, n_rows=4, n_trials=4)
    scripted = ScriptedEngine(label_logprobs=scores)
    scripted.replace_llama_cpp(monkeypatch)
    replace_training(monkeypatch)
    replace_export(monkeypatch)
    return scripted


@pytest.fixture
def sampled(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that annotate draws samples for."""
    del engine
    return replace_sampling(monkeypatch)


@pytest.fixture
def free_run(tmp_path: Path, model: Path) -> Run:
    """Of a task with free answers, and no test rows."""
    (tmp_path / "names.toml").write_text(FREE_TASK)
    settings = Settings(n_inputs=10, n_samples=2, form_filter=False, input_prompt="list")
    return create_or_open_run(tmp_path / "free", load_task(tmp_path / "names.toml"), model, settings)[0]


def run_until(run: Run, last: str) -> None:
    for stage in STAGES[: STAGES.index(last) + 1]:
        run_stage(run, stage)


def edit(run: Run, name: str, change: Edit) -> None:
    rows = read_rows(run.file(name))
    change(rows)
    write_rows(run.file(name), rows)


def kept_inputs(run: Run) -> list[str]:
    return [row["input"] for row in read_rows(run.file("inputs.jsonl")) if row["drop"] is None]


def answers(run: Run) -> dict[int, str]:
    return {row["id"]: row["output"] for row in read_rows(run.file("outputs.jsonl"))}


def first_kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["drop"] is None)


def with_settings(run: Run, **changed: object) -> Run:
    """The run as it is after a person edited settings.toml."""
    path = run.file("settings.toml")
    text = path.read_text()
    for name, value in changed.items():
        before = f"{name} = {json.dumps(getattr(run.settings, name))}"
        assert before in text
        text = text.replace(before, f"{name} = {json.dumps(value)}")
    write_text(path, text)
    return open_run(run.path)


def with_instruction(run: Run, text: str) -> Run:
    path = run.file("task.toml")
    write_text(path, path.read_text().replace(run.task.instruction, text))
    return open_run(run.path)


def test_an_edited_input_is_answered_again_and_the_others_keep_their_answers(
    free_run: Run, sampled: list[str]
) -> None:
    run_until(free_run, "curate")
    before, inputs = answers(free_run), kept_inputs(free_run)
    sampled.clear()
    edit(free_run, "inputs.jsonl", lambda rows: first_kept(rows).update(input="Edited by hand today."))
    run_until(free_run, "curate")
    assert {prompt.splitlines()[-1] for prompt in sampled} == {"Edited by hand today."}
    after = answers(free_run)
    first, *others = before
    assert list(after) == list(before)
    assert after[first] != before[first]
    assert [after[row_id] for row_id in others] == [before[row_id] for row_id in others]
    trained = {row["input"] for row in read_rows(free_run.file("train.jsonl"))}
    assert "Edited by hand today." in trained
    assert inputs[0] not in trained
    assert not free_run.file(".kept_outputs.jsonl").exists()


def test_a_row_dropped_by_hand_is_not_trained_on(free_run: Run, sampled: list[str]) -> None:
    run_until(free_run, "curate")
    before, inputs = answers(free_run), kept_inputs(free_run)
    sampled.clear()
    edit(free_run, "inputs.jsonl", lambda rows: first_kept(rows).update(drop="by hand"))
    run_until(free_run, "curate")
    assert sampled == []
    assert list(answers(free_run).items()) == list(before.items())[1:]
    assert inputs[0] not in {row["input"] for row in read_rows(free_run.file("train.jsonl"))}
    edit(free_run, "inputs.jsonl", lambda rows: rows[0].update(drop=None))  # and back again
    run_until(free_run, "curate")
    assert answers(free_run) == before
    assert {prompt.splitlines()[-1] for prompt in sampled} == {inputs[0]}


def test_rows_that_a_person_took_out_or_added(free_run: Run, sampled: list[str]) -> None:
    run_until(free_run, "annotate")
    before = answers(free_run)
    sampled.clear()

    def change(rows: list[dict[str, Any]]) -> None:
        rows.append({**rows[0], "id": 999, "input": "Added by hand today."})
        rows.remove(first_kept(rows))

    edit(free_run, "inputs.jsonl", change)
    run_until(free_run, "curate")
    after = answers(free_run)
    assert list(after) == [*list(before)[1:], 999]
    assert {prompt.splitlines()[-1] for prompt in sampled} == {"Added by hand today."}


@pytest.mark.usefixtures("engine")
def test_scored_labels_are_those_of_the_text_that_is_there(
    new_run: Run, sampled: list[str], engine: ScriptedEngine
) -> None:
    del sampled
    asked: list[str] = []

    def noted(prompt: str, labels: list[str]) -> list[float]:
        asked.append(prompt)
        return scores(prompt, labels)

    run = with_settings(new_run, form_filter=False, n_inputs=10)
    engine.label_logprobs = noted
    run_until(run, "annotate")
    before = read_rows(run.file("outputs.jsonl"))
    asked.clear()
    edit(run, "inputs.jsonl", lambda rows: first_kept(rows).update(input="Edited by hand today."))
    run_until(run, "annotate")
    assert all("Edited by hand today." in prompt for prompt in asked)
    assert asked
    assert read_rows(run.file("outputs.jsonl"))[1:] == before[1:]


def test_rows_of_an_unknown_origin_are_answered_again(free_run: Run, sampled: list[str]) -> None:
    run_until(free_run, "annotate")
    before = answers(free_run)

    def forget_origin(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row.update(output="not an answer to this")
            del row["made_from"]

    edit(free_run, "outputs.jsonl", forget_origin)
    edit(free_run, "inputs.jsonl", lambda rows: rows.reverse())  # annotate is out of date
    run_until(free_run, "annotate")
    assert answers(free_run) == before
    assert list(answers(free_run)) == list(before)[::-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda run: with_settings(run, n_samples=3),
        lambda run: with_settings(run, max_new_tokens=7),
        lambda run: with_settings(run, output_temperature=0.1),
    ],
)
def test_a_setting_of_the_answers_asks_for_all_of_them_again(
    free_run: Run, sampled: list[str], change: Callable[[Run], Run]
) -> None:
    run_until(free_run, "annotate")
    rows = read_rows(free_run.file("inputs.jsonl"))
    sampled.clear()
    run = change(free_run)
    run_until(run, "annotate")
    assert {prompt.splitlines()[-1] for prompt in sampled} == set(kept_inputs(run))
    assert read_rows(run.file("inputs.jsonl")) == rows


@pytest.mark.usefixtures("sampled")
def test_how_fast_and_how_much_keep_the_inputs_that_are_there(free_run: Run) -> None:
    run_until(free_run, "generate")
    inputs = kept_inputs(free_run)
    edit(free_run, "inputs.jsonl", lambda rows: rows[0].update(input="Edited by hand today."))
    faster = with_settings(free_run, n_threads=3, n_inputs=len(inputs) + 5)
    assert not faster.is_finished("generate")
    run_until(faster, "annotate")
    assert kept_inputs(faster)[: len(inputs)] == ["Edited by hand today.", *inputs[1:]]
    assert len(answers(faster)) >= len(inputs) + 5


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize(
    "change",
    [
        lambda run: with_instruction(run, "Give it another name."),
        lambda run: with_settings(run, input_temperature=0.5),
        lambda run: with_settings(run, seed=4),
    ],
)
def test_inputs_of_another_task_or_setting_are_made_anew_with_their_trials(
    free_run: Run, change: Callable[[Run], Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_settings(free_run, input_prompt="auto")
    run_until(run, "generate")
    before = kept_inputs(run)
    trials = run.file(".probe.jsonl").read_bytes()
    run.file(".probe.jsonl").write_bytes(trials.replace(b'"good"', b'"found": 1, "good"'))
    changed = change(run)
    assert "anew" not in capsys.readouterr().err
    run_until(changed, "generate")
    assert set(kept_inputs(changed)).isdisjoint(before)
    assert b"found" not in run.file(".probe.jsonl").read_bytes()
    assert "made anew" in capsys.readouterr().err


@pytest.mark.usefixtures("sampled")
def test_inputs_that_a_person_took_out_do_not_come_back(free_run: Run) -> None:
    run_until(free_run, "generate")
    ids = [row["id"] for row in read_rows(free_run.file("inputs.jsonl"))]
    edit(free_run, "inputs.jsonl", lambda rows: rows.pop(1))
    more = with_settings(free_run, n_inputs=20)
    run_until(more, "generate")
    after = [row["id"] for row in read_rows(more.file("inputs.jsonl"))]
    assert after[: len(ids) - 1] == [ids[0], *ids[2:]]
    assert len(after) == len(set(after))


def opened_by(engine: ScriptedEngine, run: Run) -> list[tuple[str, str | None]]:
    """The files that evaluate answered with."""
    engine.opened.clear()
    run_stage(run, "evaluate")
    return [(model, adapter) for model, adapter, _ in engine.opened]


def test_predictions_are_those_of_the_files_rows_and_prompts_that_are_there(
    finished_run: Run, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where the taking back of a stage would have removed them: they may be copied from elsewhere.
    monkeypatch.setattr("sg_local.runs.directory.remove_tree", lambda _path: None)
    run = finished_run
    base, adapter, merged = (
        (run.model.path.name, None),
        (run.model.path.name, "adapter.gguf"),
        ("model.gguf", None),
    )
    everything = [base, base, base, adapter, merged]
    assert run_stage(run, "evaluate", redo=True)
    assert opened_by(engine, run) == []
    path = run.file("predictions/tuned_merged.jsonl")
    edit(run, "predictions/tuned_merged.jsonl", lambda rows: rows[0].update(prediction="login"))
    run.file("evaluation.json").unlink()
    assert opened_by(engine, run) == [merged]
    with run.stage("export"):
        run.file("model.gguf").write_bytes(run.file("model.gguf").read_bytes() + b"\0")
    assert opened_by(engine, run) == [merged]
    edit(run, "test.jsonl", lambda rows: rows[0].update(output="refund"))
    assert opened_by(engine, run) == everything
    run = with_settings(run, max_new_tokens=9)
    for stage in STAGES[1:-1]:
        with run.stage(stage):
            pass
    assert opened_by(engine, run) == everything
    path.with_name(".tuned_merged.json").unlink()
    run.file("evaluation.json").unlink()
    assert opened_by(engine, run) == [merged]
    monkeypatch.setattr(Run, "check_model", lambda _run: None)
    run.model.path.write_bytes(run.model.path.read_bytes() + b"\0")  # the base itself
    run.file("evaluation.json").unlink()
    assert opened_by(engine, run) == [base, base, base, adapter]


def test_answers_of_a_contender_that_is_gone_are_removed(finished_run: Run, engine: ScriptedEngine) -> None:
    engine.answer = lambda _file, _prompt: "login\nand more"
    assert run_stage(finished_run, "evaluate", redo=True)
    first_line = finished_run.file("predictions/base_few_shot_first_line.jsonl")
    assert first_line.exists()
    engine.answer = lambda _file, _prompt: "login"
    edit(finished_run, "test.jsonl", lambda rows: rows.pop())
    assert run_stage(finished_run, "evaluate")
    assert not first_line.exists()


def test_settings_in_a_stage_and_outside_give_the_same_key(new_run: Run) -> None:
    from sg_local.runs.made_from import stage_key

    for stage in STAGES[:2]:
        seen = replace(new_run, settings=new_run.settings.seen_by(stage))
        assert stage_key(seen, stage) == stage_key(new_run, stage)


def test_a_run_of_an_ablation_gets_the_answers_of_the_base_and_trusts_them(
    finished_run: Run, engine: ScriptedEngine, tmp_path: Path, task: Path
) -> None:
    assert run_stage(finished_run, "evaluate", redo=True)
    settings = replace(finished_run.settings, rank=8)
    switched, _ = create_or_open_run(tmp_path / "other", load_task(task), finished_run.model.path, settings)
    switched.take_over(finished_run, STAGES[:3])
    for stage in STAGES[3:-1]:
        run_stage(switched, stage)
    (switched.path / "predictions").mkdir()
    _take_base_answers(switched, finished_run)
    base = switched.model.path.name
    assert opened_by(engine, switched) == [(base, "adapter.gguf"), ("model.gguf", None)]
