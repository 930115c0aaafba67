"""A person edits the files between the stages: what no longer fits is refused at once, and in words."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from finished_run import write_inputs, write_outputs, write_train_rows
from messages import assert_says

from sg_local.errors import InputError
from sg_local.files import write_rows
from sg_local.report.explain import explain, explained
from sg_local.runs.directory import Run
from sg_local.runs.rows import read_inputs, read_outputs, read_pairs
from sg_local.stages.curate import run_curate


def inputs(run: Run) -> list[dict[str, Any]]:
    return [{"id": number, "input": f"Text {number}.", "label": run.task.labels[0]} for number in range(3)]


def outputs(run: Run) -> list[dict[str, Any]]:
    scores = [dict.fromkeys(run.task.labels, -1.0)]
    return [
        {"id": number, "label_logprobs": scores, "output": run.task.labels[0], "drop": None}
        for number in range(3)
    ]


def changed(rows: Sequence[dict[str, Any]], number: int, **changes: object) -> list[dict[str, Any]]:
    return [{**row, **changes} if place == number else dict(row) for place, row in enumerate(rows)]


def test_rows_as_the_stages_write_them_are_read(new_run: Run) -> None:
    write_inputs(new_run, inputs(new_run))
    write_outputs(new_run, outputs(new_run))
    assert len(read_outputs(new_run, read_inputs(new_run))) == 3


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda rows: rows[:2], ["outputs.jsonl", "the input 2", "drop"]),
        (lambda rows: [], ["outputs.jsonl", "the input 0", "the input 1", "the input 2"]),
        (lambda rows: [*rows, {**rows[0], "id": 99}], ["row 99", "inputs.jsonl"]),
        (lambda rows: [*rows, rows[0]], ["the id 0 stands in two rows"]),
        (lambda rows: changed(rows, 1, id=[1]), ["line 2: id is [1]"]),
        (lambda rows: changed(rows, 1, id=None), ["line 2: id is None"]),
        (lambda rows: changed(rows, 1, id="1"), ['the id "1"', "a number"]),
        (lambda rows: [{"output": "a", "drop": None}, *rows], ["line 1: the row has no id"]),
        (lambda rows: changed(rows, 1, output=None), ["row 1", "no output"]),
        (lambda rows: changed(rows, 1, label_logprobs=[]), ["row 1", "label_logprobs"]),
        (lambda rows: changed(rows, 1, label_logprobs=[{"delivery": -1.0}]), ["row 1", "label_logprobs"]),
        (lambda rows: changed(rows, 1, label_logprobs=rows[1]["label_logprobs"] * 2), ["1 and 2 prompts"]),
        (lambda rows: changed(rows, 1, label_logprobs=[{"x": "much"}]), ["line 2: label_logprobs"]),
    ],
)
def test_outputs_that_do_not_belong_to_the_inputs_are_refused_by_curate(
    new_run: Run, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], told: list[str]
) -> None:
    write_inputs(new_run, inputs(new_run))
    write_outputs(new_run, outputs(new_run))
    write_rows(new_run.file("outputs.jsonl"), edit(outputs(new_run)))
    with pytest.raises(InputError) as caught:
        run_curate(new_run)
    assert_says(str(caught.value), new_run.file("outputs.jsonl"), *told)
    assert not new_run.file("train.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": 0}, "the id 0 stands in two rows"),
        ({"input": " "}, "input of row 1 is empty"),
        ({"input": None}, "line 2: input is None"),
        ({"id": []}, "line 2: id is []"),
        ({"label": "logn"}, "row 1 was made for 'logn'"),
        ({"seed": "many"}, "line 2: seed is 'many'"),
    ],
)
def test_inputs_that_cannot_be_answered_are_refused(
    new_run: Run, changes: dict[str, object], told: str
) -> None:
    write_inputs(new_run, inputs(new_run))
    write_outputs(new_run, outputs(new_run))
    defaults = {"prompt": "turns", "drop": None, "seed": 0}
    rows = [defaults | row for row in changed(inputs(new_run), 1, **changes)]
    write_rows(new_run.file("inputs.jsonl"), rows)
    with pytest.raises(InputError) as caught:
        run_curate(new_run)
    assert_says(str(caught.value), new_run.file("inputs.jsonl"), told)


def test_a_row_that_a_person_dropped_needs_no_answer(new_run: Run) -> None:
    write_inputs(new_run, changed(inputs(new_run), 1, drop="rude"))
    write_outputs(new_run, [row for row in outputs(new_run) if row["id"] != 1])
    assert len(read_outputs(new_run, read_inputs(new_run))) == 2


@pytest.mark.parametrize("scores", [[], [{"delivery": -1.0}], "twice"])
def test_a_row_is_explained_as_far_as_its_scores_go(new_run: Run, scores: object) -> None:
    write_inputs(new_run, inputs(new_run))
    rows = outputs(new_run)
    edited = rows[1]["label_logprobs"] * 2 if scores == "twice" else scores
    write_outputs(new_run, changed(rows, 1, label_logprobs=edited))
    explanation = explain(new_run, "1")
    assert explanation["label_scores"] is None
    assert "row 1" in explained(explanation)


PAIR = {"id": 0, "input": "Log me in.", "output": "login"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output": None}, "row 0 is not dropped and has no output"),
        ({"output": " "}, "row 0 is not dropped and has no output"),
        ({"output": "logn"}, "row 0 has the output 'logn'"),
        ({"input": ""}, "row 0 is not dropped and has no input"),
        ({"copies": -1}, "row 0 has -1 copies"),
        ({"copies": 10**12}, "row 0 has 1000000000000 copies"),
        ({"targets": {}}, "row 0 has targets"),
        ({"targets": {"login": 0.0}}, "row 0 has targets"),
        ({"targets": {"login": -1.0, "refund": 3.0}}, "row 0 has targets"),
        ({"targets": {"login": "much"}}, "line 1: targets is"),
        ({"id": 1.5}, "line 1: id is 1.5"),
        ({"id": "x" * 5000, "output": None}, "is not dropped"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused_by_train(
    new_run: Run, changes: dict[str, object], told: str
) -> None:
    write_inputs(new_run, inputs(new_run))
    write_outputs(new_run, outputs(new_run))
    write_train_rows(new_run, [{**PAIR, **changes}, {**PAIR, "id": 1}, {**PAIR, "id": 1}])
    with pytest.raises(InputError) as caught:
        read_pairs(new_run)
    assert_says(str(caught.value), new_run.file("train.jsonl"), told)
    assert len(str(caught.value)) < 1000


def test_a_dropped_pair_may_lack_what_training_needs(new_run: Run) -> None:
    rows = [{**PAIR, "output": None, "drop": "unfinished", "copies": 0}, {**PAIR, "id": "demonstration-1"}]
    write_inputs(new_run, inputs(new_run))
    write_outputs(new_run, outputs(new_run))
    write_train_rows(new_run, rows)
    assert len(read_pairs(new_run)) == 2


def test_an_empty_file_has_no_rows(new_run: Run) -> None:
    for write in (write_inputs, write_outputs, write_train_rows):
        write(new_run, [])
    assert read_outputs(new_run, read_inputs(new_run)) == []
    assert read_pairs(new_run) == []
