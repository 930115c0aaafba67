"""evaluation.json and the rows of predictions/: what `evaluate` writes, and the tables read.

    {"contenders": {"tuned_merged": {"exact_match": {"mean": 0.71, "interval_95": [0.615, 0.79]}}},
     "gain": {"over": "base_few_shot", "mean": 0.37, "interval_95": [0.25, 0.49], "p": 2.4e-07, "verdict": "better"},
     "gain_over_best": {"over": "base_label_scoring", "mean": 0.23, ...}}

The values of a metric stand under the metric's key, the gain over an opponent under the opponent's `gain_key`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict, TypeGuard, cast

from sg_local.selfguide.calibration import CALIBRATION_ERROR, Calibration, calibration_of
from sg_local.selfguide.contenders import BASELINE, OPPONENTS, TUNED, Contender
from sg_local.selfguide.metrics import (
    METRIC_OF_KIND,
    METRICS,
    LabelCounts,
    Metric,
    exact_match,
    is_label,
    label_counts,
    label_distance,
    metric_of,
    metrics_for,
)
from sg_local.selfguide.statistics import Difference, Mean, difference, mean_of
from sg_local.task import Task

FROM_TEST_FILE = "the task's test file"  # in `rows_from`
FROM_LABELLED = "held-out labelled rows: accuracy on labelled rows"
FROM_MADE = "held-out made data: agreement with the base's own answers, not accuracy"
_MADE = FROM_MADE.partition(":")[0]  # an earlier version ended otherwise
# Up to this share of samples that say what a held-out row takes as right, it is as likely wrong as right.
UNSURE_SHARE = 0.5


class PredictionRow(TypedDict):
    """An answer. Its scores stand beside these keys, one for each metric: see `scores_of`."""

    input: str
    prediction: str
    reference: str  # the right output; of several the first
    references: NotRequired[list[str]]  # where several are right: all of them
    label_logprobs: NotRequired[dict[str, float]]  # in nats, of contenders whose labels are scored


class ContenderScores(TypedDict):
    """The served file and its scores. The mean of each metric stands beside these keys: see `metric_mean`."""

    served: str
    served_sha256: str
    demonstrations: int
    # In tasks with labels:
    no_label_share: NotRequired[float]
    label_distance: NotRequired[float]
    labels: NotRequired[dict[str, LabelCounts]]
    calibration: NotRequired[Calibration]  # where the labels are scored


class Gain(Difference):
    """How much better one contender answers than another."""

    of: str
    over: str
    test: str


class Evaluation(TypedDict):
    """evaluation.json. Gains over other opponents stand beside these keys: see `gains`."""

    task: str
    metric: str
    rows_from: str
    n_rows: int
    contenders: dict[str, ContenderScores]
    gain: Gain
    gain_over_best: NotRequired[Gain]  # earlier versions did not write it


class Served(NamedTuple):
    """The file with which a contender answered."""

    file: str
    sha256: str
    n_demonstrations: int


def predictions_file(contender: Contender) -> str:
    """The file with its answers, in a run's directory."""
    return f"predictions/{contender}.jsonl"


def predictions_note(contender: Contender) -> str:
    """Where a run says what the answers were made from."""
    return f"predictions/.{contender}.json"


def from_made(same_share: object) -> str:
    """`rows_from` of held-out made rows. same_share: of samples that say what these rows take as right, on average."""
    if not isinstance(same_share, float) or same_share > UNSURE_SHARE:
        return FROM_MADE
    return (
        f"{FROM_MADE}; what these rows take as right is as likely wrong: {same_share:.0%} of the samples say it. "
        "Test rows or 40 labelled rows would show the accuracy"
    )


def is_accuracy(evaluation: Evaluation) -> bool:
    """Whether the scores tell how often an answer is right; else, how often it is the base's own."""
    return not evaluation["rows_from"].startswith(_MADE)


def prediction_row(
    text: str,
    prediction: str,
    *references: str,
    judge: Metric | None = None,
    label_logprobs: Mapping[str, float] | None = None,
) -> PredictionRow:
    """An answer with its scores. references: at least one right output; each metric takes the best of them.

    judge: the metric that the task is judged by.
    """
    row: dict[str, object] = {"input": text, "prediction": prediction, "reference": references[0]}
    if len(references) > 1:
        row["references"] = list(references)
    row |= {metric: _best_score(prediction, references, metric) for metric in metrics_for(references, judge)}
    if label_logprobs:
        row["label_logprobs"] = dict(label_logprobs)
    return cast(PredictionRow, row)


def _best_score(prediction: str, references: Sequence[str], metric: Metric) -> float:
    return round(max(metric.score(prediction, reference) for reference in references), 5)


def references_of(row: PredictionRow) -> list[str]:
    """All right outputs of an answered row."""
    return row.get("references") or [row["reference"]]


def first_line_rows(rows: Sequence[PredictionRow], task: Task) -> list[PredictionRow]:
    """The first line of each answer; no rows if that changes nothing, or if an example's output has several lines.

    A model that was never tuned to chats often keeps writing after its answer. Its users cut the answer there.
    """
    if any("\n" in example.output.strip() for example in task.examples):
        return []
    if not any("\n" in row["prediction"] for row in rows):
        return []
    return [
        prediction_row(
            row["input"],
            row["prediction"].partition("\n")[0].strip(),
            *references_of(row),
            judge=metric_of(task),
        )
        for row in rows
    ]


def evaluation_of(
    task: Task,
    answered: Mapping[Contender, Sequence[PredictionRow]],
    served: Mapping[Contender, Served],
    source: str,
) -> Evaluation:
    """The scores of all contenders on the same rows, and the gains of the tuned model. source: of the rows."""
    metric = metric_of(task)
    contenders = {
        contender: _contender_scores(task, rows, served[contender]) for contender, rows in answered.items()
    }
    opponents = [contender for contender in OPPONENTS if contender.gain_key and contender in answered]
    best = strongest_opponent(contenders, metric)
    evaluation: dict[str, object] = {
        "task": task.name,
        "metric": metric,
        **{str(item): item.definition for item in metrics_in(answered[TUNED]) if item.definition},
        **({"calibration_error": CALIBRATION_ERROR} if task.is_classification else {}),
        "rows_from": source,
        "n_rows": len(answered[TUNED]),
        "contenders": contenders,
        **{opponent.gain_key: _gain(answered, opponent, metric) for opponent in opponents},
        "gain_over_best": _gain(answered, best, metric),
    }
    return cast(Evaluation, evaluation)


def strongest_opponent(contenders: Mapping[Contender, ContenderScores], metric: Metric) -> Contender:
    """The opponent with the highest mean; of equal ones, the first in OPPONENTS.

    It is chosen on the same rows on which it is compared, which favours the base.
    """
    present = [opponent for opponent in OPPONENTS if opponent in contenders]
    return max(present, key=lambda opponent: metric_mean(contenders[opponent], metric)["mean"])


def scores_of(rows: Sequence[PredictionRow], metric: Metric) -> list[float]:
    """The rows' scores by one metric. Earlier versions wrote fewer of them: what a row lacks is scored here."""
    return [
        cast(float, _values(row)[metric])
        if metric in _values(row)
        else _best_score(row["prediction"], references_of(row), metric)
        for row in rows
    ]


def metrics_in(rows: Sequence[PredictionRow]) -> list[Metric]:
    """The metrics by which every row is scored."""
    return [metric for metric in Metric if all(metric in _values(row) for row in rows)]


def metric_mean(scores: ContenderScores, metric: Metric) -> Mean:
    """A contender's mean by one metric."""
    return cast(Mean, _values(scores)[metric])


def metrics_of(evaluation: Evaluation) -> list[Metric]:
    """The metrics that all contenders have. Files of earlier versions lack newer metrics."""
    return [
        metric
        for metric in Metric
        if all(_is_mean(_values(scores).get(metric)) for scores in evaluation["contenders"].values())
    ]


def gains(evaluation: Evaluation) -> dict[Contender, Gain]:
    """The gains of the tuned model over each opponent that has a `gain_key`."""
    values = _values(evaluation)
    return {
        opponent: cast(Gain, values[opponent.gain_key])
        for opponent in OPPONENTS
        if opponent.gain_key in values
    }


def gain_over_best(evaluation: Evaluation) -> Gain:
    """The gain over the strongest opponent; in a file of an earlier version, over the strongest of those in `gains`."""
    if "gain_over_best" in evaluation:
        return evaluation["gain_over_best"]
    compared = gains(evaluation)
    scores = {opponent: evaluation["contenders"][opponent] for opponent in compared}
    return compared[strongest_opponent(scores, METRICS[evaluation["metric"]])]


def is_prediction(row: Mapping[str, object]) -> TypeGuard[PredictionRow]:
    """Whether a row has all keys of a row of predictions/, with its scores.

    Those that compare fields only some rows have, and earlier versions did not write them.
    """
    texts = [row.get(key) for key in ("input", "prediction", "reference")]
    references = row.get("references", [])
    texts += references if isinstance(references, list) else [None]
    logprobs = row.get("label_logprobs", {})
    return (
        all(isinstance(text, str) for text in texts)
        and all(_is_number(row.get(item, 0 if item.needs_json else None)) for item in Metric)
        and isinstance(logprobs, dict)
        and all(map(_is_number, logprobs.values()))
    )


def calibration_in(evaluation: Evaluation, contender: Contender) -> Calibration | None:
    """The calibration of a contender's label probabilities; files of earlier versions do not have it."""
    value = _values(evaluation["contenders"].get(contender, {})).get("calibration")
    match value:
        case {
            "calibration_error": error,
            "temperature": temperature,
            "calibration_error_at_temperature": crossed,
            "risk_coverage": list(covered),
        } if all(map(_is_number, (error, temperature, crossed))) and all(map(_is_covered, covered)):
            return cast(Calibration, value)
    return None


def is_evaluation(value: object) -> TypeGuard[Evaluation]:
    """Whether a value has all keys that tables need. Keys that earlier versions did not write may be missing."""
    match value:
        case {"task": str(), "metric": str(metric), "n_rows": int(), "contenders": dict(contenders), **rest}:
            keys = [opponent.gain_key for opponent in OPPONENTS] + ["gain_over_best"]
            return (
                metric in METRIC_OF_KIND.values()
                and isinstance(rest.get("rows_from"), str)
                and {BASELINE, TUNED} <= contenders.keys()
                and all(_has_scores(scores, metric) for scores in contenders.values())
                and BASELINE.gain_key in rest
                and all(_is_gain(rest[key]) for key in keys if key in rest)
            )
    return False


def _contender_scores(task: Task, rows: Sequence[PredictionRow], served: Served) -> ContenderScores:
    scores: dict[str, object] = {
        "served": served.file,
        "served_sha256": served.sha256,
        "demonstrations": served.n_demonstrations,
        **{metric: mean_of(scores_of(rows, metric)) for metric in metrics_in(rows)},
    }
    if task.is_classification:
        answers = [row["prediction"] for row in rows]
        references = [matched_reference(row) for row in rows]
        n_outside = sum(not is_label(answer, task.labels) for answer in answers)
        scores["no_label_share"] = round(n_outside / len(rows), 5)
        scores["label_distance"] = round(label_distance(answers, references, task.labels), 5)
        scores["labels"] = label_counts(answers, references, task.labels)
        scored = [row for row in rows if "label_logprobs" in row]
        if scored:
            scores["calibration"] = calibration_of(
                [row["prediction"] for row in scored],
                [row["reference"] for row in scored],
                [row["label_logprobs"] for row in scored],
            )
    return cast(ContenderScores, scores)


def matched_reference(row: PredictionRow) -> str:
    """The right output that counts in tables of labels: of several the one that was answered, else the first."""
    right = (text for text in references_of(row) if exact_match(row["prediction"], text))
    return next(right, row["reference"])


def _gain(answered: Mapping[Contender, Sequence[PredictionRow]], opponent: Contender, metric: Metric) -> Gain:
    after, before = (scores_of(answered[contender], metric) for contender in (TUNED, opponent))
    compared = difference(after, before)
    return {
        "of": TUNED,
        "over": opponent,
        "mean": compared["mean"],
        "interval_95": compared["interval_95"],
        "test": metric.test,
        "p": compared["p"],
        "verdict": compared["verdict"],
    }


def _values(typed: Mapping[str, object]) -> Mapping[str, object]:
    """A TypedDict as a mapping, to read keys that its type does not name."""
    return typed


def _has_scores(scores: object, metric: str) -> bool:
    """Whether a contender has the mean by which it is compared; its other keys are optional."""
    return isinstance(scores, dict) and _is_mean(scores.get(metric))


def _is_gain(value: object) -> bool:
    match value:
        case {"of": str(), "over": str(), "p": p, "verdict": str()}:
            return _is_number(p) and _is_mean(value)
    return False


def _is_mean(value: object) -> bool:
    match value:
        case {"mean": mean, "interval_95": [low, high]}:
            return all(map(_is_number, (mean, low, high)))
    return False


def _is_covered(value: object) -> bool:
    match value:
        case {"share": share, "right": right, "least_probability": least}:
            return all(map(_is_number, (share, right, least)))
    return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
