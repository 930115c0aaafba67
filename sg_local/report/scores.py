"""The scores of a run as a table to read, and whether the tuned model is worse than the base at its best.

score_table(run)     reads evaluation.json
                      Exact Match  95 % interval  ...
base_few_shot               0.340  0.255 - 0.437
tuned_merged                0.710  0.615 - 0.790
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import cast

from sg_local.errors import InputError
from sg_local.files import read_json, read_rows
from sg_local.report import tables
from sg_local.report.fallback import chat_note, in_words
from sg_local.report.review import recorded_summary, review_lines
from sg_local.runs.directory import Run
from sg_local.runs.handed_out import read_fallback
from sg_local.selfguide.advice import about_a_classifier, next_step
from sg_local.selfguide.calibration import LEAST_TEMPERATURE
from sg_local.selfguide.contenders import BASELINE, TUNED, Contender
from sg_local.selfguide.evaluation import (
    FROM_LABELLED,
    FROM_TEST_FILE,
    Evaluation,
    PredictionRow,
    calibration_in,
    gain_over_best,
    gains,
    is_accuracy,
    is_evaluation,
    is_prediction,
    metric_mean,
    metrics_of,
    predictions_file,
)
from sg_local.selfguide.fallback import choice_of, mean
from sg_local.selfguide.metrics import METRICS, LabelCounts, metric_of
from sg_local.selfguide.statistics import Verdict

MAX_EVALUATION_BYTES = 1 << 20
# A line says so where one label is given to nine rows of ten, and less than three quarters have it.
ONE_ANSWER = 0.9
LESS_THAN = 0.75


def read_evaluation(run: Run) -> Evaluation:
    """The evaluation of a run. Raises InputError where it is missing, damaged, or not as `evaluate` wrote it."""
    path = run.written_file("evaluation.json")
    value = read_json(path, MAX_EVALUATION_BYTES)
    if not is_evaluation(value):
        raise InputError(f"{path} is damaged: `sg-local evaluate {run.path} --redo` makes it anew")
    return value


def read_predictions(run: Run, contender: Contender) -> list[PredictionRow]:
    """The answers of a contender. Raises InputError where they are missing, damaged, or not as they were written."""
    path = run.written_file(predictions_file(contender))
    rows = read_rows(path)
    if not all(map(is_prediction, rows)):
        raise InputError(f"{path} is damaged: `sg-local evaluate {run.path} --redo` makes it anew")
    return cast(list[PredictionRow], rows)


def score_table(run: Run) -> str:
    """The evaluation as lines to read: a row for each contender, the gain, and what was scored."""
    evaluation = read_evaluation(run)
    lines = [f"{run.task.name}: {tables.counted(evaluation['n_rows'], 'row')}, {evaluation['rows_from']}", ""]
    lines += [*_contender_lines(evaluation), ""]
    before, after = (evaluation["contenders"][contender].get("labels") for contender in (BASELINE, TUNED))
    if before and after:  # runs of earlier versions do not have them
        lines += [*_label_lines(before, after, run.task.labels), ""]
        lines += _one_answer_lines(after, evaluation["n_rows"])
    lines += _calibration_lines(evaluation)
    if summary := recorded_summary(run.manifest()["stages"].get("curate", {})):
        lines += [*review_lines(summary), ""]
    return "\n".join([*lines, *_gain_lines(evaluation)])


def scores_with_advice(run: Run) -> str:
    """The same, above it that no gain is shown where that is so, and below it what is worth doing next."""
    evaluation = read_evaluation(run)
    advice = [
        _judged_anew(run, evaluation),
        next_step(run.task, evaluation),
        about_a_classifier(run.task, run.labelled_rows),
    ]
    lines = [*no_gain_lines(run), score_table(run), *(f"next: {text}" for text in advice if text)]
    return "\n".join(lines)


def _judged_anew(run: Run, evaluation: Evaluation) -> str | None:
    """Says so where an earlier version judged a run by another metric than its task is judged by."""
    before, now = METRICS[evaluation["metric"]], metric_of(run.task)
    if before == now:
        return None
    return (
        f"an earlier version judged by {before.heading}, this one judges such a task by {now.heading}: "
        f"`{shlex.join(['sg-local', 'evaluate', str(run.path), '--redo'])}` answers and scores the rows anew"
    )


def no_gain_lines(run: Run) -> list[str]:
    """What comes first where the tuned model is not shown to be better: the scores, and what answers in its place."""
    evaluation = read_evaluation(run)
    best = gain_over_best(evaluation)
    if best["verdict"] == Verdict.BETTER:
        return []
    tuned, base = (mean(evaluation, name) for name in (best["of"], best["over"]))
    opens = "worse than the base at its best" if best["verdict"] == Verdict.WORSE else "no gain is shown"
    scores = f"{best['of']} {tables.score(tuned)}, {best['over']} {tables.score(base)}"
    lines = [f"{opens}: {scores}{_in_what(evaluation)}"]
    if fallback := read_fallback(run):
        lines += [in_words(fallback), *filter(None, [chat_note(fallback)])]
    elif choice := choice_of(evaluation):
        lines.append(
            f"`sg-local run` with --fallback hands out the base by {choice.way.heading} in its place"
        )
    return [*lines, ""]


def _contender_lines(evaluation: Evaluation) -> list[str]:
    has_labels = "no_label_share" in evaluation["contenders"][TUNED]
    # Where an answer is a label, how much of its words is right says nothing.
    metrics = [METRICS[evaluation["metric"]]] if has_labels else metrics_of(evaluation)
    heads, widths = [""], [tables.name_width(evaluation["contenders"])]
    for metric in metrics:
        heads += [metric.heading, f"  {'95 % interval':15}"]
        widths += [len(metric.heading) + 1, 17]
    lines = [tables.aligned([*heads, *(["no label"] if has_labels else [])], [*widths, 8])]
    for name, scores in evaluation["contenders"].items():
        cells = [name]
        for metric in metrics:
            mean = metric_mean(scores, metric)
            low, high = map(tables.score, mean["interval_95"])
            cells += [tables.score(mean["mean"]), f"  {f'{low} - {high}':15}"]
        if has_labels:
            cells.append(tables.share(scores["no_label_share"]))
        lines.append(tables.aligned(cells, [*widths, 8]))
    return lines


def _gain_lines(evaluation: Evaluation) -> list[str]:
    best = gain_over_best(evaluation)
    by_opponent = {gain["over"]: gain for gain in [*gains(evaluation).values(), best]}
    lines = []
    for gain in by_opponent.values():
        low, high = gain["interval_95"]
        lines.append(
            f"gain in {evaluation['metric']}, {gain['of']} over {gain['over']}: {tables.gain(gain['mean'])} "
            f"(95 % interval {tables.gain(low)} to {tables.gain(high)}, p = {tables.p_value(gain['p'])}): "
            f"{gain['verdict']}"
        )
    told = f"verdict, against the base's best way ({best['over']}): {best['verdict']}{_in_what(evaluation)}"
    return [*lines, told]


def _in_what(evaluation: Evaluation) -> str:
    """What a verdict is about, where that is not how often an answer is right."""
    return (
        "" if is_accuracy(evaluation) else " in agreement with the base's own answers, which is no accuracy"
    )


def _label_lines(
    before: Mapping[str, LabelCounts], after: Mapping[str, LabelCounts], labels: Sequence[str]
) -> list[str]:
    """Which labels base and tuned model give, and how often they are right."""
    none = LabelCounts(rows=0, given=0, right=0)
    counted = [label for label in labels if label in before or label in after]
    in_table = counted[: tables.MAX_LABELS_IN_TABLE]
    width = tables.name_width(in_table)
    widths = [width, 6, 11, 7, 11, 7]
    lines = [
        tables.aligned(["", "", BASELINE, TUNED], [width, 6, 18, 18]),
        tables.aligned(["label", "rows", "given", "right", "given", "right"], widths),
    ]
    for label in in_table:
        base, tuned = before.get(label, none), after.get(label, none)
        numbers = (
            tuned["rows"] or base["rows"],
            base["given"],
            base["right"],
            tuned["given"],
            tuned["right"],
        )
        lines.append(tables.aligned([label, *map(str, numbers)], widths))
    if n_more := len(counted) - len(in_table):
        lines.append(f"and {tables.counted(n_more, 'label')} more, in evaluation.json")
    return lines


def _one_answer_lines(after: Mapping[str, LabelCounts], n_rows: int) -> list[str]:
    """Says so where the tuned model gives one label to nearly all rows, and far fewer have it."""
    return [
        f"{TUNED} says {label!r} to {counts['given']} of {n_rows} rows, and {counts['rows']} are: what it learned from "
        "the made rows does not tell these apart. Compare the inputs in train.jsonl with them; a new run with another "
        "--seed makes others"
        for label, counts in after.items()
        if counts["given"] >= ONE_ANSWER * n_rows and counts["rows"] < LESS_THAN * n_rows
    ]


def _calibration_lines(evaluation: Evaluation) -> list[str]:
    """How right the tuned model is where it is sure: what `predict --abstain-below` leaves to a person."""
    calibration = calibration_in(evaluation, TUNED)
    if calibration is None:
        return []
    parts = [f"{item['share']:.0%} {tables.score(item['right'])}" for item in calibration["risk_coverage"]]
    return [
        f"{TUNED}, right among the surest: {', '.join(parts)}; "
        f"calibration error {tables.score(calibration['calibration_error'])}",
        "",
    ]


def label_temperature(run: Run, contender: Contender) -> float:
    """At which a contender's label probabilities are as right as they are sure; 1 where no test rows say so."""
    is_evaluated = "evaluate" in run.manifest()["stages"]  # not while it is done anew
    if not is_evaluated or not run.file("evaluation.json").exists():
        return 1.0
    evaluation = read_evaluation(run)
    calibration = calibration_in(evaluation, contender)
    if calibration is None or evaluation["rows_from"] not in {FROM_TEST_FILE, FROM_LABELLED}:
        return 1.0
    return max(calibration["temperature"], LEAST_TEMPERATURE)


def worse_than(run: Run) -> str | None:
    """Which of the base's ways the tuned model is significantly worse than, the strongest, and in what; else None."""
    evaluation = read_evaluation(run)
    best = gain_over_best(evaluation)
    if best["verdict"] != Verdict.WORSE:
        return None
    return f"{best['over']}, the base's best way{',' * (not is_accuracy(evaluation))}{_in_what(evaluation)}"
