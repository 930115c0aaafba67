"""What `evaluate` writes and the tables read: metrics, contenders, and files that are damaged or older."""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from finished_run import rewrite
from messages import assert_says

from sg_local.errors import InputError
from sg_local.report.page_data import verdict_sentence
from sg_local.report.scores import read_evaluation, read_predictions, score_table
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import BASELINE, TUNED, Contender
from sg_local.selfguide.evaluation import (
    FROM_MADE,
    FROM_TEST_FILE,
    Served,
    evaluation_of,
    first_line_rows,
    from_made,
    gain_over_best,
    gains,
    is_prediction,
    metric_mean,
    metrics_in,
    metrics_of,
    prediction_row,
    predictions_file,
    scores_of,
)
from sg_local.selfguide.metrics import Metric, metric_of
from sg_local.task import Example, Task

TASK = Task("inbox", "Which box?", (Example("Money back.", "refund"),), ("refund", "login"))
SERVED = dict.fromkeys(Contender, Served("model.gguf", "6f2e", 1))


def answered(**predictions: str) -> dict[Contender, Any]:
    """For each contender its answers to two rows, "refund" and "login"; by name of the enum."""
    return {
        Contender[name]: [
            prediction_row(f"message {row}", prediction, reference)
            for row, (prediction, reference) in enumerate(
                zip(text.split(), ["refund", "login"], strict=True), 1
            )
        ]
        for name, text in predictions.items()
    }


EVALUATION = evaluation_of(
    TASK,
    answered(FEW_SHOT="login login", LABEL_SCORING="refund login", TUNED_MERGED="refund refund"),
    SERVED,
    "the task's test file",
)


def test_contenders_are_known_by_their_keys() -> None:
    assert json.dumps({TUNED: BASELINE}) == '{"tuned_merged": "base_few_shot"}'
    assert predictions_file(TUNED) == "predictions/tuned_merged.jsonl"
    assert len({contender.heading for contender in Contender}) == len(Contender)
    assert Contender.LABEL_SCORING.is_expected(with_labels=True)
    assert not Contender.LABEL_SCORING.is_expected(with_labels=False)
    assert not Contender.MANY_SHOT.is_expected(with_labels=True)


def test_each_metric_has_its_mean_and_each_opponent_its_gain(finished_run: Run) -> None:
    rewrite(finished_run, "evaluation.json", json.dumps(EVALUATION))
    found = read_evaluation(finished_run)
    assert found == EVALUATION
    assert metrics_of(found) == [Metric.EXACT_MATCH, Metric.ROUGE_L]
    assert metric_mean(found["contenders"][TUNED], Metric.EXACT_MATCH)["mean"] == 0.5
    assert {opponent: gain["mean"] for opponent, gain in gains(found).items()} == {
        "base_few_shot": 0,
        "base_label_scoring": -0.5,
    }
    assert gain_over_best(found)["over"] == "base_label_scoring"
    assert found["contenders"][TUNED]["labels"]["refund"] == {"rows": 1, "given": 2, "right": 1}


def test_the_base_at_its_best_may_be_the_base_without_examples() -> None:
    """A model that follows instructions can be worse with the examples than without."""
    answers = answered(ZERO_SHOT="refund login", FEW_SHOT="login login", TUNED_MERGED="refund refund")
    gain = gain_over_best(evaluation_of(TASK, answers, SERVED, "the task's test file"))
    assert (gain["over"], gain["mean"]) == ("base_zero_shot", -0.5)
    answers = answered(ZERO_SHOT="login login", FEW_SHOT="login login", TUNED_MERGED="refund refund")
    gain = gain_over_best(evaluation_of(TASK, answers, SERVED, "the task's test file"))
    assert gain["over"] == BASELINE  # it scores alike, and is the baseline of every run


def test_a_file_from_before_a_metric_came_is_shown_without_it(finished_run: Run) -> None:
    older = json.loads(json.dumps(EVALUATION))
    del older["contenders"][TUNED]["rouge_l"]
    rewrite(finished_run, "evaluation.json", json.dumps(older))
    assert metrics_of(read_evaluation(finished_run)) == [Metric.EXACT_MATCH]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _evaluation: [],
        lambda evaluation: {**evaluation, "metric": "perplexity"},
        lambda evaluation: {**evaluation, "rows_from": None},
        lambda evaluation: {key: value for key, value in evaluation.items() if key != "gain"},
        lambda evaluation: {**evaluation, "gain_over_best": {"mean": 1}},
        lambda evaluation: {**evaluation, "gain_over_label_scoring": {**evaluation["gain"], "p": "small"}},
        lambda evaluation: {**evaluation, "gain": {**evaluation["gain"], "interval_95": [0.1]}},
        lambda evaluation: {**evaluation, "contenders": {TUNED: evaluation["contenders"][TUNED]}},
        lambda evaluation: {**evaluation, "contenders": {key: {} for key in (BASELINE, TUNED)}},
    ],
)
def test_a_damaged_evaluation_is_refused(finished_run: Run, damage: Callable[[Any], Any]) -> None:
    rewrite(finished_run, "evaluation.json", json.dumps(damage(EVALUATION)))
    with pytest.raises(InputError, match=r"evaluate .* --redo"):
        read_evaluation(finished_run)


def test_a_row_that_lacks_a_score_is_refused(finished_run: Run) -> None:
    name = predictions_file(TUNED)
    good = prediction_row("Pay me.", "Refund.", "refund")
    rewrite(finished_run, name, json.dumps(good))
    assert scores_of(read_predictions(finished_run, TUNED), Metric.EXACT_MATCH) == [1]
    lacking = {key: value for key, value in good.items() if key != Metric.ROUGE_L}
    rewrite(finished_run, name, f"{json.dumps(good)}\n{json.dumps(lacking)}\n")
    with pytest.raises(InputError, match=f"evaluate {finished_run.path} --redo"):
        read_predictions(finished_run, TUNED)


def test_first_lines_are_no_contender_where_examples_have_more_lines() -> None:
    rows = [prediction_row("Pay me.", "refund \nInput: and so on", "refund")]
    [cut] = first_line_rows(rows, TASK)
    assert (cut["prediction"], scores_of([cut], Metric.EXACT_MATCH)) == ("refund", [1])
    assert first_line_rows([cut], TASK) == []
    assert first_line_rows(rows, Task("t", "Do it.", (Example("Pay me.", "refund\nof money"),))) == []


def test_of_several_right_outputs_the_best_counts_for_each_metric() -> None:
    row = prediction_row("Give me tea.", "May I have tea?", "Could I have some tea?", "may i have tea")
    assert row["reference"] == "Could I have some tea?"
    assert scores_of([row], Metric.EXACT_MATCH) == scores_of([row], Metric.ROUGE_L) == [1.0]
    polite = Task("polite", "Say it politely.", (Example("a", "b"),))
    [cut] = first_line_rows([{**row, "prediction": "May I have tea?\nYes"}], polite)
    assert (cut["references"], scores_of([cut], Metric.EXACT_MATCH)) == (row["references"], [1.0])
    assert is_prediction(row)
    assert not is_prediction({**row, "references": [3]})
    assert "references" not in prediction_row("Pay me.", "refund", "refund")


def test_fields_are_scored_where_the_right_outputs_are_json(finished_run: Run) -> None:
    right = '{"item": "pens", "n": 10}'
    row = prediction_row("ten pens", '{"n":10,"item":"Pens"}', right)
    assert scores_of([row], Metric.ALL_FIELDS_RIGHT) == scores_of([row], Metric.FIELDS_RIGHT) == [1.0]
    assert scores_of([row], Metric.EXACT_MATCH) == [0.0]  # it minds the order of keys
    plain = prediction_row("ten pens", right, "pens")
    assert metrics_in([row]) == list(Metric)
    assert metrics_in([row, plain]) == [Metric.EXACT_MATCH, Metric.ROUGE_L]
    # of an earlier version, and damaged
    older = {
        key: value for key, value in row.items() if key not in (Metric.FIELDS_RIGHT, Metric.ALL_FIELDS_RIGHT)
    }
    assert is_prediction(older)
    assert not is_prediction({**row, Metric.FIELDS_RIGHT: "all"})
    asked = Task("t", "Do it.", (Example("a", right),))
    answers = {contender: [row] for contender in (BASELINE, TUNED)}
    served = dict.fromkeys(answers, Served("model.gguf", "", 0))
    evaluation = evaluation_of(asked, answers, served, "a file")
    assert metric_mean(evaluation["contenders"][TUNED], Metric.ALL_FIELDS_RIGHT)["mean"] == 1.0
    rewrite(finished_run, "evaluation.json", json.dumps(evaluation))
    assert "all fields right" in score_table(finished_run)


ORDER = Task("order", "Write it as JSON.", (Example("Ten pens.", '{"item": "pens", "n": 10}'),))


def order_rows(*answers: str, right: tuple[str, ...] = ('{"item": "cups", "n": 2}', "none")) -> Any:
    """Answers to two messages; the right output of the second is no JSON."""
    return [
        prediction_row("a message", answer, reference, judge=metric_of(ORDER))
        for answer, reference in zip(answers, right, strict=True)
    ]


def test_json_is_judged_by_its_fields_where_rouge_l_says_the_opposite(finished_run: Run) -> None:
    answers = {
        BASELINE: order_rows('{"n": 2, "item": "cups"}', "None."),
        TUNED: order_rows('{"item": "cups", "n": 3}', "none of it"),
    }
    evaluation = evaluation_of(ORDER, answers, SERVED, FROM_TEST_FILE)
    assert scores_of(answers[TUNED], Metric.FIELDS_RIGHT) == [0.5, 0]
    assert evaluation["metric"] == Metric.FIELDS_RIGHT
    assert metrics_of(evaluation) == list(Metric)
    assert (evaluation["gain"]["mean"], evaluation["gain_over_best"]["mean"]) == (-0.75, -0.75)
    rewrite(finished_run, "evaluation.json", json.dumps(evaluation))
    assert "gain in share_of_fields_right" in score_table(finished_run)
    assert_says(verdict_sentence(read_evaluation(finished_run)), "0.250 (share of fields right)", "1.000")


def test_first_lines_of_json_are_judged_as_the_answers_are() -> None:
    rows = order_rows('{"item": "cups", "n": 2}\nInput: more', "none")
    assert scores_of(rows, Metric.FIELDS_RIGHT) == [0, 1]
    assert scores_of(first_line_rows(rows, ORDER), Metric.FIELDS_RIGHT) == [1, 1]


def test_of_several_right_outputs_the_one_with_most_fields_right_counts() -> None:
    row = prediction_row(
        "Two cups.",
        '{"item": "cups", "n": 2}',
        "none",
        '{"item": "mugs", "n": 2}',
        judge=Metric.FIELDS_RIGHT,
    )
    assert scores_of([row], Metric.FIELDS_RIGHT) == [0.5]


def test_rows_of_an_earlier_version_are_scored_by_what_they_lack() -> None:
    older = [
        {key: value for key, value in row.items() if key != Metric.FIELDS_RIGHT}
        for row in order_rows('{"item": "cups", "n": 3}', "none")
    ]
    assert scores_of(cast(Any, older), Metric.FIELDS_RIGHT) == [0.5, 1]


def test_agreement_with_its_own_answers_is_told_from_accuracy(finished_run: Run) -> None:
    assert from_made(0.9) == from_made(None) == FROM_MADE
    unsure = from_made(0.38)
    assert unsure.startswith(FROM_MADE)
    assert "as likely wrong: 38% of the samples" in unsure
    for source, is_told in ((FROM_TEST_FILE, False), (FROM_MADE, True), (unsure, True)):
        rewrite(finished_run, "evaluation.json", json.dumps({**EVALUATION, "rows_from": source}))
        evaluation = read_evaluation(finished_run)
        assert ("no accuracy" in score_table(finished_run).splitlines()[-1]) is is_told
        assert ("no accuracy" in verdict_sentence(evaluation)) is is_told


def test_labels_are_counted_by_the_right_one_that_was_answered() -> None:
    rows = [prediction_row("Pay me.", answer, "refund", "login") for answer in ("login", "refund", "other")]
    answers = dict.fromkeys((BASELINE, TUNED), rows)
    labels = evaluation_of(TASK, answers, SERVED, "")["contenders"][TUNED]["labels"]
    assert labels["refund"] == {"rows": 2, "given": 1, "right": 1}
    assert labels["login"] == {"rows": 1, "given": 1, "right": 1}
