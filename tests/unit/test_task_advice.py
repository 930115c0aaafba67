"""What a task lacks before a run, and what is worth doing after one."""

from dataclasses import replace
from typing import Any

import pytest
from messages import assert_says

from sg_local.report.scores import read_evaluation, score_table, scores_with_advice
from sg_local.runs.directory import Run
from sg_local.selfguide.advice import about_a_classifier, next_step, task_warnings
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.evaluation import FROM_TEST_FILE, Evaluation
from sg_local.task import Example, Task

EXAMPLES = (
    Example("Pay me.", "refund"),
    Example("I lost my password.", "login"),
    Example("Where is my parcel?", "delivery"),
)
LABELS = ("refund", "login", "delivery")
TASK = Task("inbox", "Sort it. Answer with refund, login or delivery.", EXAMPLES, LABELS)
TEST = [Example(f"Message {number}.", LABELS[number % 3]) for number in range(30)]


def test_a_good_task_has_no_warning() -> None:
    assert task_warnings(TASK, TEST, []) == []
    assert task_warnings(TASK, [], []) == []  # without test rows the check says so by itself
    free = replace(TASK, labels=(), instruction="Say it politely.")
    assert task_warnings(free, TEST, []) == []


def test_a_label_that_no_example_has() -> None:
    task = replace(TASK, examples=EXAMPLES[:2])
    (warning,) = task_warnings(task, TEST, [])
    assert_says(warning, "the label 'delivery'", "give each one")
    assert task_warnings(task, TEST, [Example("Has it been sent?", "delivery")]) == []
    # Three examples cannot show four labels.
    four = replace(TASK, labels=(*LABELS, "bill"), instruction=f"{TASK.instruction} Or bill.")
    (warning,) = task_warnings(four, TEST, [])
    assert_says(warning, "the label 'bill'", "labelled rows")


def test_a_label_that_the_instruction_does_not_name() -> None:
    (warning,) = task_warnings(replace(TASK, instruction="Sort it: REFUND, or  login."), TEST, [])
    assert_says(warning, "does not name the label 'delivery'", "Answer with one of: refund, login, delivery.")


def test_a_test_row_that_is_an_example() -> None:
    (warning,) = task_warnings(TASK, [*TEST, Example("pay me", "refund")], [])
    assert_says(warning, "1 of 31 test rows is an example")


@pytest.mark.parametrize(("n_rows", "warns"), [(1, True), (29, True), (30, False)])
def test_a_verdict_needs_rows(n_rows: int, warns: bool) -> None:
    assert bool(task_warnings(TASK, TEST[:n_rows], [])) == warns


def evaluated(
    tuned: float, base: float, verdict: str, right: tuple[int, int, int] = (20, 20, 20), n_rows: int = 90
) -> Evaluation:
    """Scores with intervals of 0.1 to both sides."""

    def scores(mean: float) -> dict[str, Any]:
        return {"exact_match": {"mean": mean, "interval_95": [mean - 0.1, mean + 0.1]}, "no_label_share": 0}

    counts = zip(LABELS, right, strict=True)
    gain = {"of": TUNED, "over": "base_few_shot", "mean": tuned - base, "verdict": verdict}
    contenders = {Contender.FEW_SHOT: scores(base), TUNED: scores(tuned)}
    contenders[TUNED]["labels"] = {label: {"rows": 30, "given": 30, "right": n} for label, n in counts}
    evaluation: Any = {
        "metric": "exact_match",
        "rows_from": FROM_TEST_FILE,
        "n_rows": n_rows,
        "contenders": contenders,
        "gain": gain,
        "gain_over_best": gain,
    }
    return evaluation  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        (evaluated(0.7, 0.5, "better", (20, 20, 0)), ["'delivery' is never right", "another example"]),
        (evaluated(0.40, 0.42, "no difference shown"), ["at chance (3 labels)", "larger model"]),
        (evaluated(0.40, 0.42, "no difference shown", (30, 0, 0)), ["at chance"]),
        (evaluated(0.7, 0.7, "no difference shown"), ["no gain", "labelled rows"]),
        (evaluated(0.7, 0.7, "no difference shown", n_rows=12), ["30 test rows or more", "12 can show"]),
        (evaluated(0.7, 0.5, "better") | {"rows_from": "held-out made data"}, ["test rows", "agreement"]),
    ],
)
def test_what_to_do_next_is_told_by_what_was_seen(evaluation: Evaluation, told: list[str]) -> None:
    assert_says(str(next_step(TASK, evaluation)), *told)


def test_where_all_is_well_nothing_is_told() -> None:
    assert next_step(TASK, evaluated(0.7, 0.5, "better")) is None
    assert next_step(TASK, evaluated(0.7, 0.42, "better")) is None
    one_example = replace(TASK, examples=EXAMPLES[:1])
    step = str(next_step(one_example, evaluated(0.7, 0.5, "better", (20, 20, 0))))
    assert_says(step, "give it an example")


def test_labelled_rows_enough_for_a_classifier_are_told() -> None:
    labelled = [Example(f"{number}", LABELS[number % 3]) for number in range(150)]
    assert_says(str(about_a_classifier(TASK, labelled)), "150 labelled rows", "classic classifier")
    assert about_a_classifier(TASK, labelled[1:]) is None
    assert about_a_classifier(replace(TASK, labels=()), labelled) is None


def test_the_table_of_labels_has_exact_match_alone_and_ends_with_what_to_do(finished_run: Run) -> None:
    table = scores_with_advice(finished_run)
    assert table.startswith(score_table(finished_run))
    assert "Exact Match" in table
    assert "ROUGE-L" not in table
    evaluation = read_evaluation(finished_run)
    step = next_step(finished_run.task, evaluation)
    assert table.endswith(f"next: {step}" if step else evaluation["gain_over_best"]["verdict"])
