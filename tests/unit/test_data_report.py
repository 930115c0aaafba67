"""The numbers of made data, their table and warnings, and the life of one row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from sg_local.records import write_rows
from sg_local.run import Run
from sg_local.selfguide.data_report import data_report, report_lines, warnings
from sg_local.task import Example, Task

Call = Callable[..., Result]
Rows = list[dict[str, Any]]

BOXES = Task(
    "boxes",
    "Which box?",
    (Example("I want my money back.", "refund"), Example("I cannot log in.", "login")),
    ("refund", "login"),
)
FREE = Task("polite", "Say it politely.", (Example("Send it.", "Could you send it?"),))


def made(*rows: tuple[str, str | None, str | None]) -> Rows:
    """Rows of inputs.jsonl: input, label, drop."""
    return [
        {"id": number, "input": text, "label": label, "drop": drop}
        for number, (text, label, drop) in enumerate(rows)
    ]


def curated(*rows: tuple[int, str, str, str | None, int]) -> Rows:
    """Rows of train.jsonl: id, input, output, drop, copies."""
    return [
        {"id": number, "input": text, "output": output, "drop": drop, "copies": copies}
        for number, text, output, drop, copies in rows
    ]


INPUTS = made(
    ("Pay me back now.", "refund", None),
    ("Pay me back now!", "login", "duplicate"),
    ("The door of my account is shut.", "login", None),
    ("x", "login", "length"),
    ("Where is the bill?", "refund", None),
)
ROWS = curated(
    (0, "Pay me back now.", "refund", None, 2),
    (2, "The door of my account is shut.", "login", None, 3),
    (4, "Where is the bill?", "refund", "low_confidence", 0),
)


def test_the_funnel_is_told_by_reason_and_label() -> None:
    report = data_report(INPUTS, ROWS, BOXES, [])
    assert (report["attempts"], report["kept"]) == (5, 2)
    assert report["dropped"] == {
        "duplicate": {"n": 1, "by_label": {"login": 1}},
        "length": {"n": 1, "by_label": {"login": 1}},
        "low_confidence": {"n": 1, "by_label": {"refund": 1}},
    }
    assert report["labels"]["refund"] == {
        "made_for": 2,
        "annotated": 2,
        "kept": 1,
        "shown": 2,
        "demonstrations": 1,
    }
    lines = "\n".join(report_lines(report))
    assert "5 inputs were asked for" in lines
    assert "-1 low_confidence    20%  1 refund" in lines


def test_distinctness_and_lengths() -> None:
    rows = curated(
        (0, "a b", "refund", None, 1), (1, "a b c", "login", None, 1), (2, "d e f g", "login", None, 1)
    )
    report = data_report(made(*((row["input"], "login", None) for row in rows)), rows, BOXES, [])
    assert report["distinct_1"] == round(7 / 9, 4)  # a and b occur twice
    assert report["distinct_2"] == round(5 / 6, 4)
    assert report["nearest_rouge_l"] == round((0.8 + 0.8 + 0) / 3, 4)
    assert report["input_characters"]["made"] == [3, 3, 5, 7, 7]
    assert report["input_characters"]["demonstrations"][0] == 16
    assert report["input_characters"]["demonstrations"][-1] == 21


def test_the_demonstrations_are_no_made_rows() -> None:
    gold = [{"id": "demonstration-1", "input": "a", "output": "refund", "drop": None, "copies": 4}]
    report = data_report(INPUTS, gold + ROWS, BOXES, ["demonstration-1"])
    assert report["kept"] == 2
    assert report["labels"]["refund"]["shown"] == 6  # in training they count


def test_free_answers_are_told_by_how_they_vary() -> None:
    rows = curated(
        *((n, f"thing {n}", "Could you?", None, 1) for n in range(3)), (3, "go on", "Go on!", None, 1)
    )
    report = data_report(made(*((row["input"], None, None) for row in rows)), rows, FREE, [])
    assert (report["distinct_outputs"], report["commonest_output_share"]) == (2, 0.75)
    assert report["copied_input_share"] == 0.25
    assert "labels" not in report
    assert any("one answer makes 75% of the rows" in warning for warning in warnings(report))


def test_what_looks_bad_is_said_with_what_helps() -> None:
    like = "I want my money back"
    rows = curated(*((n, f"{like} {n}", "refund", None, 1) for n in range(9)))
    report = data_report(made(*((row["input"], "refund", None) for row in rows)), rows, BOXES, [])
    told = warnings(report)
    assert [warning.split(" ")[0] for warning in told] == ["inputs", "100%", "0"]
    assert "--input-temperature" in told[0]
    assert "'login'" in told[2]
    assert warnings(data_report(INPUTS, ROWS, BOXES, [])) == []


def test_nothing_made_is_a_report_too() -> None:
    report = data_report(made(("x", "refund", "length")), [], BOXES, [])
    assert report["kept"] == 0
    assert report_lines(report)
    free = data_report([], [], FREE, [])
    assert free["commonest_output_share"] == 0.0
    assert report_lines(free)


# One row


@pytest.fixture
def told_run(new_run: Run) -> Run:
    """Three rows: one in training, one that annotate saw last, one that generate dropped."""
    with new_run.stage("generate", ["task.toml"], ["inputs.jsonl"]):
        write_rows(
            new_run.file("inputs.jsonl"),
            [
                {"id": 0, "input": "Pay me.", "label": "refund", "prompt": "turns", "drop": None, "seed": 5},
                {
                    "id": 1,
                    "input": "In \x1b[31mred",
                    "label": "login",
                    "prompt": "turns",
                    "drop": None,
                    "seed": 6,
                },
                {
                    "id": 2,
                    "input": "x" * 5000,
                    "label": "login",
                    "prompt": "turns",
                    "drop": "length",
                    "seed": 7,
                },
            ],
        )
    with new_run.stage("annotate", ["inputs.jsonl"], ["outputs.jsonl"]):
        scores = [{"refund": -0.1, "login": -3.0}]
        write_rows(
            new_run.file("outputs.jsonl"),
            [{"id": n, "label_logprobs": scores, "output": "refund", "drop": None} for n in (0, 1)],
        )
    with new_run.stage("curate", ["inputs.jsonl", "outputs.jsonl"], ["train.jsonl"]):
        rows: Rows = [
            {"id": "demonstration-1", "input": "Money back.", "output": "refund", "drop": None, "copies": 1},
            {"id": 0, "input": "Pay me.", "output": "refund", "confidence": 0.9, "drop": None, "copies": 2},
            {"id": 1, "input": "In red", "output": "refund", "drop": "low_confidence", "copies": 0},
        ]
        write_rows(new_run.file("train.jsonl"), rows)
    return new_run


@pytest.mark.parametrize(
    ("row_id", "told", "is_in_training"),
    [
        ("0", ["label           refund", '"login": -3.0', "copies          2"], True),
        ("1", ["In \\x1b[31mred", "low_confidence"], False),
        ("2", ["drop            length", "annotated: no", "curated: no", "(5000 characters)"], False),
        ("demonstration-1", ["made: no", "Money back."], True),
    ],
)
def test_a_rows_life(
    sg: Call,
    told_run: Run,
    contents: Callable[[Path], dict[str, bytes]],
    row_id: str,
    told: list[str],
    is_in_training: bool,
) -> None:
    before = contents(told_run.path)
    result = sg("curate", told_run.path, "--explain", row_id)
    assert result.exit_code == 0, result.stderr
    for text in told:
        assert text in result.stdout
    assert f"in training: {'yes' if is_in_training else 'no'}" in result.stdout
    assert "\x1b" not in result.stdout
    assert len(result.stdout) < 5000
    assert contents(told_run.path) == before
    found = json.loads(sg("curate", told_run.path, "--explain", row_id, "--json").stdout)
    assert found["in_training"] is is_in_training


def test_an_unknown_row_is_refused_with_those_that_are(sg: Call, told_run: Run, new_run: Run) -> None:
    result = sg("curate", told_run.path, "--explain", "9")
    assert result.exit_code == 2
    assert "has no row '9': its rows are 0 to 2, demonstration-1" in result.stderr
    assert sg("curate", told_run.path, "--explain", "0", "--redo").exit_code == 2
    assert sg("curate", told_run.path, "--json").exit_code == 2


def test_a_run_without_rows_says_so(sg: Call, new_run: Run) -> None:
    result = sg("curate", new_run.path, "--explain", "0")
    assert (result.exit_code, "not made yet" in result.stderr) == (2, True)
