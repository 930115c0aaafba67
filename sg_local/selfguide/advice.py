"""What a person can do for a task: before a run, by what the task lacks, and after it, by what its scores look like.

    task_warnings(task, test, labelled)   ["no example has the label 'invoice': ..."]
    next_step(task, evaluation)           "the label 'refund' is never right in 26 rows: give it an example"

Pure functions: lines for people, which change nothing.
"""

from collections import Counter
from collections.abc import Sequence

from sg_local.escape import one_line
from sg_local.selfguide.contenders import OPPONENTS, TUNED
from sg_local.selfguide.evaluation import (
    FROM_LABELLED,
    FROM_TEST_FILE,
    Evaluation,
    gain_over_best,
    metric_mean,
)
from sg_local.selfguide.given import text_key
from sg_local.selfguide.metrics import METRICS
from sg_local.selfguide.statistics import Verdict
from sg_local.task import MAX_EXAMPLES, Example, Task

# Exact McNemar's test with fewer rows shows only gains that need no test.
LEAST_TEST_ROWS = 30
LEAST_ROWS_OF_A_LABEL = 3  # with none right of fewer, chance is a reason too
# Of each label: from about here a linear classifier on words is as good as a small model, and takes a second.
ENOUGH_LABELLED_OF_A_LABEL = 50


def task_warnings(task: Task, test: Sequence[Example], labelled: Sequence[Example]) -> list[str]:
    """What of a task is likely to cost quality, or says less than it seems to."""
    warnings = []
    shown = {example.output for example in (*task.examples, *labelled)}
    if without := [label for label in task.labels if label not in shown]:
        advice = "give each one" if len(task.labels) <= MAX_EXAMPLES else "labelled rows for them help most"
        warnings.append(f"no example has the label {_listed(without)}: {advice}")
    instruction = " ".join(task.instruction.casefold().split())
    if unnamed := [label for label in task.labels if " ".join(label.casefold().split()) not in instruction]:
        warnings.append(
            f"the instruction does not name the label {_listed(unnamed)}: end it with "
            f'"Answer with one of: {one_line(", ".join(task.labels))}."'
        )
    inputs = {text_key(example.input) for example in task.examples}
    if n_shown := sum(text_key(row.input) in inputs for row in test):
        verb = "is an example" if n_shown == 1 else "are examples"
        warnings.append(
            f"{n_shown} of {len(test)} test rows {verb}: the model has seen the answer, take it out of one of the two"
        )
    if 0 < len(test) < LEAST_TEST_ROWS:
        warnings.append(
            f"so few test rows ({len(test)}) can show a very large gain only: {LEAST_TEST_ROWS} or more for a verdict, "
            "100 are good"
        )
    return warnings


def next_step(task: Task, evaluation: Evaluation) -> str | None:
    """What is worth doing next, by what the scores show; None where there is nothing to be said."""
    if evaluation["rows_from"] not in {FROM_TEST_FILE, FROM_LABELLED}:
        return "give the task test rows: these scores are agreement with the base's own answers, not accuracy"
    tuned = evaluation["contenders"][TUNED]
    never = [
        label
        for label, counts in tuned.get("labels", {}).items()
        if counts["rows"] >= LEAST_ROWS_OF_A_LABEL and not counts["right"]
    ]
    is_better = gain_over_best(evaluation)["verdict"] == Verdict.BETTER
    if evaluation["n_rows"] < LEAST_TEST_ROWS and not is_better:
        return f"{LEAST_TEST_ROWS} test rows or more: {evaluation['n_rows']} can show a very large gain only"
    if _is_at_chance(task, evaluation):
        return (
            f"base and tuned model judge at chance ({len(task.labels)} labels): a larger model is likely to help, "
            "more rows of this one are not"
        )
    if never:
        has_one = {example.output for example in task.examples}
        what = "another example" if all(label in has_one for label in never) else "an example"
        return f"the label {_listed(never)} is never right: give it {what}, or labelled rows"
    if is_better:
        return None
    return (
        "no gain is shown over the base's best way: labelled rows or real inputs of your own, other examples, or a "
        "larger model"
    )


def about_a_classifier(task: Task, labelled: Sequence[Example]) -> str | None:
    """Says so where there are labelled rows enough for a simpler way."""
    counts = Counter(row.output for row in labelled)
    if task.labels and min(counts[label] for label in task.labels) >= ENOUGH_LABELLED_OF_A_LABEL:
        return (
            f"{len(labelled)} labelled rows are enough for a classic classifier (word counts and logistic regression): "
            "try one beside this, it trains in a second"
        )
    return None


def _is_at_chance(task: Task, evaluation: Evaluation) -> bool:
    """Whether neither the tuned model nor the base's best way is shown to judge better than drawing a label."""
    if not task.labels:
        return False
    metric = METRICS[evaluation["metric"]]
    ways = [name for name in (TUNED, *OPPONENTS) if name in evaluation["contenders"]]
    lows = [metric_mean(evaluation["contenders"][name], metric)["interval_95"][0] for name in ways]
    return max(lows) <= 1 / len(task.labels)


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(one_line(label)) for label in labels[:5])
    return f"{shown} and {len(labels) - 5} more" if len(labels) > 5 else shown
