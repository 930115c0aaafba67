"""What the page of a run shows, as plain values: no file, no HTML, no picture.

    changes(before, after, metric)     rows of predictions/, in the same order
    -> [Change(number=1, kind="fixed", input="Where is it?", right=("delivery",), before="login", after="delivery")]
    confusion(rows, ["refund", "login"])
    -> Confusion(labels=("refund", "login"), answers=("refund", "login", "no label"), counts=((20, 3, 2), (1, 25, 0)))

Labels beyond the commonest MAX_LABELS are counted together, so that a page stays readable.
Source of the reliability diagram, here with equal numbers of rows in its bins: Guo et al. (arXiv 1706.04599).
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from sg_local.report import tables
from sg_local.report.made_data import DataReport
from sg_local.report.variety import Spread, distinct_share, nearest_rouge_l, spread
from sg_local.selfguide.calibration import at_temperature, probability_of
from sg_local.selfguide.contenders import CONTENDERS, TUNED
from sg_local.selfguide.evaluation import (
    Evaluation,
    Gain,
    PredictionRow,
    gain_over_best,
    is_accuracy,
    matched_reference,
    metric_mean,
    references_of,
    scores_of,
)
from sg_local.selfguide.labels import Known, label_scores
from sg_local.selfguide.metrics import METRICS, Metric, normalize
from sg_local.selfguide.rows import DropReason, InputRow, OutputRow, PairRow, ReviewRow, Word, source_of
from sg_local.selfguide.statistics import Verdict
from sg_local.settings import Settings, as_flag, declared_for

MAX_LABELS = 20
NO_LABEL, OTHER_LABELS = "no label", "other labels"
IN_TRAINING = "in training"
N_BINS = 5
MIN_ROWS_OF_A_BIN = 5


class Kind(StrEnum):
    """What became of a test row, by Exact Match; and by a metric that has values between."""

    FIXED = "fixed"
    BROKEN = "broken"
    RIGHT = "right in both"
    WRONG = "wrong in both"
    BETTER = "better"
    WORSE = "worse"
    EQUAL = "equal"


@dataclass(frozen=True)
class Change:
    """A test row with the answer before and after training."""

    number: int  # from 1, in the order of the test rows
    kind: Kind
    input: str
    right: tuple[str, ...]
    before: str
    after: str
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Confusion:
    """How often an answer was given (columns) where a label is right (rows)."""

    labels: tuple[str, ...]
    answers: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Bin:
    """Rows of about equal confidence: the mean of it, and the share that is right, or as it was made for."""

    n_rows: int
    probability: float
    agreement: float


@dataclass(frozen=True)
class Variety:
    """How varied some texts are, and how long; of equal numbers of texts, since distinct shares fall with them."""

    n_texts: int
    distinct_1: float
    distinct_2: float
    nearest_rouge_l: float
    characters: Spread


@dataclass(frozen=True)
class Drop:
    """How many rows a reason dropped, in which stage, by label."""

    stage: str
    reason: str
    meaning: str
    flag: str  # the setting that decides it, as an option
    n_rows: int
    share: float  # of the inputs that were asked for
    by_label: tuple[int, ...]


@dataclass(frozen=True)
class MadeRow:
    """A row that the model made, or a real one, and what became of it."""

    id: str
    input: str
    output: str
    made_for: str
    source: str
    confidence: float | None
    copies: int
    outcome: str  # IN_TRAINING, or the drop reason


@dataclass(frozen=True)
class Reviewed:
    """A row that a person corrected, dropped or accepted."""

    id: str
    word: str
    input: str
    model_output: str
    output: str  # the person's; "" for a dropped row


@dataclass(frozen=True)
class ChangedSetting:
    """A setting of a run that is not the default."""

    name: str
    value: str
    default: str
    stage: str


def verdict_sentence(evaluation: Evaluation) -> str:
    """What came out, in one sentence with the numbers that it rests on."""
    best, metric = gain_over_best(evaluation), METRICS[evaluation["metric"]]
    opens = {str(Verdict.BETTER): "Better than the base", str(Verdict.WORSE): "Worse than the base"}
    of_tuned, of_base = (
        metric_mean(evaluation["contenders"][name], metric)["mean"] for name in (TUNED, best["over"])
    )
    n_rows, way = evaluation["n_rows"], heading(best["over"])
    rows = tables.counted(n_rows, "row")
    if metric == Metric.EXACT_MATCH:
        told = (
            f"the tuned model has {round(of_tuned * n_rows)} of {rows} right, the base at its best "
            f"({way}) {round(of_base * n_rows)}"
        )
    else:
        told = (
            f"the tuned model's answers to {rows} score {tables.score(of_tuned)} ({metric.heading}), those of "
            f"the base at its best ({way}) {tables.score(of_base)}"
        )
    of_what = (
        "" if is_accuracy(evaluation) else " What counts as right is the base's own answers: no accuracy."
    )
    return f"{opens.get(best['verdict'], 'No difference shown')}: {told}.{of_what}"


def gain_sentence(gain: Gain) -> str:
    """The gain, its interval and its p."""
    low, high = map(tables.gain, gain["interval_95"])
    return (
        f"{tables.gain(gain['mean'])} over {heading(gain['over'])}, 95 % interval {low} to {high}, "
        f"p = {tables.p_value(gain['p'])}: {gain['verdict']}"
    )


def heading(contender: str) -> str:
    """A contender's name for people; a key of another version as it is."""
    return CONTENDERS[contender].heading if contender in CONTENDERS else contender


def changes(before: Sequence[PredictionRow], after: Sequence[PredictionRow], metric: Metric) -> list[Change]:
    """The rows with both answers. Raises ValueError where these are not answers to the same rows."""
    found = []
    answers = zip(before, after, scores_of(before, metric), scores_of(after, metric), strict=True)
    for number, (old, new, old_score, new_score) in enumerate(answers, 1):
        if (old["input"], references_of(old)) != (new["input"], references_of(new)):
            raise ValueError(f"row {number} is not the same row in both")
        found.append(
            Change(
                number,
                _kind(old_score, new_score, metric),
                old["input"],
                tuple(references_of(old)),
                old["prediction"],
                new["prediction"],
                old_score,
                new_score,
            )
        )
    return found


def _kind(before: float, after: float, metric: Metric) -> Kind:
    if metric == Metric.EXACT_MATCH:
        if before == after:
            return Kind.RIGHT if after else Kind.WRONG
        return Kind.FIXED if after else Kind.BROKEN
    if before == after:
        return Kind.EQUAL
    return Kind.BETTER if after > before else Kind.WORSE


def shown_labels(references: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The labels that tables and pictures name: all, or the commonest MAX_LABELS, in the order of the task."""
    counts = Counter(map(normalize, references))
    commonest = sorted(labels, key=lambda label: -counts[normalize(label)])[:MAX_LABELS]
    return [label for label in labels if label in commonest]


def confusion(rows: Sequence[PredictionRow], labels: Sequence[str], shown: Sequence[str]) -> Confusion:
    """Counts by right label and answer. labels: all of the task; shown: those with a line of their own."""
    places = {normalize(label): OTHER_LABELS for label in labels} | {
        normalize(label): label for label in shown
    }
    lines = [*shown, *([OTHER_LABELS] if len(shown) < len(labels) else [])]
    counts = Counter(
        (
            places.get(normalize(matched_reference(row)), OTHER_LABELS),
            places.get(normalize(row["prediction"]), NO_LABEL),
        )
        for row in rows
    )
    answers = [*lines, *([NO_LABEL] if any(answer == NO_LABEL for _, answer in counts) else [])]
    return Confusion(
        tuple(lines),
        tuple(answers),
        tuple(tuple(counts[line, answer] for answer in answers) for line in lines),
    )


def label_shares(texts: Sequence[str], labels: Sequence[str], shown: Sequence[str]) -> list[float]:
    """The share of each shown label among some answers, and last, where there are such, of all others."""
    counts = Counter(map(normalize, texts))
    shares = [counts[normalize(label)] / max(1, len(texts)) for label in shown]
    if len(shown) < len(labels):
        shares.append(
            sum(counts[normalize(label)] for label in labels if label not in shown) / max(1, len(texts))
        )
    return shares


def drops(report: DataReport, settings: Settings, shown: Sequence[str]) -> list[Drop]:
    """Every reason that dropped a row, in the order of the stages, the commonest first."""
    found = []
    for stage, reasons in report["dropped"].items():
        for reason, dropped in reasons.items():
            known = DropReason(reason) if reason in list(DropReason) else None
            setting = known.setting if known else None
            by_label = [dropped["by_label"].get(label, 0) for label in shown]
            found.append(
                Drop(
                    stage,
                    reason,
                    known.meaning if known else "a person's own word",
                    as_flag(setting, getattr(settings, setting)) if setting else "",
                    dropped["n"],
                    dropped["n"] / max(1, report["attempts"]),
                    tuple(by_label),
                )
            )
    return found


def made_rows(
    inputs: Sequence[InputRow], outputs: Sequence[OutputRow], pairs: Sequence[PairRow]
) -> list[MadeRow]:
    """All rows in the order of their files: the examples first, then every input."""
    answered = {row["id"]: row for row in outputs}
    curated = {row["id"]: row for row in pairs}
    of_inputs = {row["id"] for row in inputs}
    others = [
        MadeRow(
            str(row["id"]),
            row["input"],
            row["output"] or "",
            "",
            source_of(row),
            row["confidence"],
            row["copies"],
            row["drop"] or IN_TRAINING,
        )
        for row in pairs
        if row["id"] not in of_inputs
    ]
    made = []
    for row in inputs:
        answer, pair = answered.get(row["id"]), curated.get(row["id"])
        outcome = row["drop"] or (pair and pair["drop"]) or (answer and answer["drop"])
        output = (pair and pair["output"]) or (answer and answer["output"])
        made.append(
            MadeRow(
                str(row["id"]),
                row["input"],
                output or "",
                row["label"] or "",
                source_of(row),
                pair["confidence"] if pair else None,
                pair["copies"] if pair and not outcome else 0,
                outcome or (IN_TRAINING if pair else "not in train.jsonl"),
            )
        )
    return others + made


def reviewed_rows(words: Iterable[ReviewRow], inputs: Sequence[InputRow]) -> list[Reviewed]:
    """The reviewed rows, those first in which the person differed from the model."""
    texts = {row["id"]: row["input"] for row in inputs}
    rows = [
        Reviewed(str(row["id"]), row["word"], texts[row["id"]], row["model_output"], row["output"] or "")
        for row in words
    ]
    order = (Word.ANSWER, Word.DROP, Word.ACCEPT)
    return sorted(rows, key=lambda row: order.index(Word(row.word)))


def reliability(probabilities: Sequence[float], agrees: Sequence[bool]) -> list[Bin]:
    """Bins of equal numbers of rows, the least sure first; [] where rows are too few for that."""
    if len(probabilities) < N_BINS * MIN_ROWS_OF_A_BIN:
        return []
    order = sorted(range(len(probabilities)), key=lambda row: probabilities[row])
    bounds = [round(len(order) * part / N_BINS) for part in range(N_BINS + 1)]
    parts = [order[low:high] for low, high in pairwise(bounds)]
    return [
        Bin(
            len(part),
            sum(probabilities[row] for row in part) / len(part),
            sum(agrees[row] for row in part) / len(part),
        )
        for part in parts
    ]


def annotation_reliability(
    outputs: Sequence[OutputRow],
    made_for: Mapping[int | str, str | None],
    labels: Sequence[str],
    removes_bias: bool,
    known: Known,
) -> list[Bin]:
    """How often the likeliest label is the one that the input was made for, by its probability before that counts.

    outputs: with label scores of all labels. known: beside the scores of these. [] where rows are too few.
    """
    if not outputs or len({len(row["label_logprobs"]) for row in outputs}) > 1:  # somebody edited them
        return []
    scores = label_scores(
        [row["label_logprobs"] for row in outputs],
        [made_for.get(row["id"]) for row in outputs],
        labels,
        removes_bias=removes_bias,
        weighs_evidence=False,
        known=known,
    ).last
    compared = [
        (max(row), labels[row.index(max(row))] == label)
        for row, label in zip(scores, (made_for.get(row["id"]) for row in outputs), strict=True)
        if label is not None
    ]
    return reliability([p for p, _ in compared], [agrees for _, agrees in compared])


def answer_reliability(rows: Sequence[PredictionRow]) -> list[Bin]:
    """How often answers are right, by the probability of the label that they are; [] where none is recorded."""
    scored = [row for row in rows if row.get("label_logprobs")]
    return reliability(
        [probability_of(row["prediction"], at_temperature(row["label_logprobs"], 1)) for row in scored],
        [score == 1 for score in scores_of(scored, Metric.EXACT_MATCH)],
    )


def varieties(groups: Mapping[str, Sequence[str]]) -> dict[str, Variety]:
    """The variety of groups of texts, of as many of each as the smallest group has, drawn by a fixed seed."""
    n_texts = min((len(texts) for texts in groups.values()), default=0)
    found = {}
    for name, texts in groups.items():
        drawn = random.Random(0).sample(list(texts), n_texts)
        found[name] = Variety(
            n_texts,
            distinct_share(drawn, 1),
            distinct_share(drawn, 2),
            nearest_rouge_l(drawn)[0],
            spread(texts),
        )
    return found


def changed_settings(settings: Settings) -> list[ChangedSetting]:
    """The settings that are not the defaults, in the order of their declaration."""
    defaults = Settings().as_dict()
    return [
        ChangedSetting(name, _word(value), _word(defaults[name]), declared_for(name) or "every stage")
        for name, value in settings.as_dict().items()
        if value != defaults[name]
    ]


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
