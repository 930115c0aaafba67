"""Metrics: how good an answer is; and the distribution of answers in tasks with labels.

    exact_match("Support.", "support") -> 1.0
    rouge_l("how many chapters", "how many chapters are there") -> 0.75
    Metric.ROUGE_L.heading -> "ROUGE-L"
    metrics_for(['{"n": 10}']) -> all four; of a text that is no JSON only Exact Match and ROUGE-L

A metric is one entry of `Metric`; evaluation.json and all tables follow it.

Exact Match compares after lower-casing, removing punctuation and collapsing white space (SELF-GUIDE, section 4).
ROUGE-L is the word-level F-measure of the `rouge-score` package; the paper's code computes it over characters, so
its numbers do not compare. Where right outputs are JSON, their fields are compared too (exact_answers.py), and where
the outputs of all examples are JSON of one shape, that decides: of the right shape, a wrong answer has most of its
words right.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from itertools import combinations
from typing import Any, Self, TypedDict

from sg_local.errors import InputError
from sg_local.selfguide.exact_answers import all_fields_right, parsed, shape_of, share_of_fields_right
from sg_local.selfguide.statistics import MCNEMAR, SIGN_CHANGES
from sg_local.task import Task

# The kinds of tasks: with labels; with JSON of one shape as answers; with any other free answers.
CLASSIFICATION, STRUCTURED, GENERATION = "classification", "structured", "generation"

# Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han: scripts without spaces between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


class LabelCounts(TypedDict):
    """For a label: rows, answers (`given`), and correct answers."""

    rows: int
    given: int
    right: int


def normalize(text: str) -> str:
    """Text as Exact Match compares it. Text of punctuation only, such as the label "+", keeps its punctuation."""
    lowered = unicodedata.normalize("NFC", text).lower()
    plain = "".join(character for character in lowered if not _is_punctuation(character))
    return " ".join(plain.split()) or " ".join(lowered.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the normalized texts are equal, else 0.0."""
    return float(normalize(prediction) == normalize(reference))


def is_label(answer: str, labels: Sequence[str]) -> bool:
    """Whether an answer is one of the labels, by Exact Match."""
    return normalize(answer) in {normalize(label) for label in labels}


def label_distance(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> float:
    """How far the answers' label distribution is from the references': total variation distance, 0..1.

    It is half the sum of the absolute differences of the shares. All answers that are no label count as one label more.
    """
    places = {normalize(label): place for place, label in enumerate(labels)}
    counts = Counter(places.get(normalize(text), len(labels)) for text in answers)
    expected = Counter(places.get(normalize(text), len(labels)) for text in references)
    return (
        sum(
            abs(counts[place] / len(answers) - expected[place] / len(references))
            for place in range(len(labels) + 1)
        )
        / 2
    )


def label_counts(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> dict[str, LabelCounts]:
    """For each label: {"refund": {"rows": 25, "given": 31, "right": 22}, ...}.

    Precision is right / given, recall is right / rows. Labels without rows and answers are omitted.
    """
    given, true = Counter(map(normalize, answers)), Counter(map(normalize, references))
    right = Counter(
        normalize(reference)
        for answer, reference in zip(answers, references, strict=True)
        if exact_match(answer, reference)
    )
    return {
        label: {"rows": true[key], "given": given[key], "right": right[key]}
        for label, key in zip(labels, map(normalize, labels), strict=True)
        if true[key] or given[key]
    }


def check_labels(labels: Sequence[str]) -> None:
    """Raises InputError with all pairs of labels that Exact Match cannot tell apart, such as "C" and "C++"."""
    faults = [
        f"labels {first!r} and {second!r} are the same for scoring, which ignores case and punctuation: "
        "rename one, in words"
        for first, second in combinations(labels, 2)
        if normalize(first) == normalize(second)
    ]
    if faults:
        raise InputError("\n".join(faults))


def words(text: str) -> list[str]:
    """The units of ROUGE-L: lower-case words of letters and digits.

    For English these are the tokens of the rouge-score package, which drops all but a-z and 0-9. In scripts without
    spaces each character is a word, as is usual for Chinese; so is each emoji.
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    units: list[str] = []
    before = ""  # what the character before belongs to: a "word", a single-character "unit", or neither
    for character in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(character)
        is_unit = category == "So" or _SPACELESS.match(character)
        if category[0] == "M" and before:  # accents and vowel signs belong to the letter before
            units[-1] += character
        elif is_unit and category[0] in "LNS":
            units.append(character)
            before = "unit"
        elif category[0] not in "LN":
            before = ""
        elif before == "word":
            units[-1] += character
        else:
            units.append(character)
            before = "word"
    return units


class _Tokenizer:
    """The tokenizer that rouge-score gets instead of its default."""

    tokenize = staticmethod(words)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


def rouge_l(prediction: str, reference: str) -> float:
    """Word-level ROUGE-L F-measure, 0..1; Exact Match if neither text has a word."""
    if not words(prediction) and not words(reference):
        return exact_match(prediction, reference)
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


class Metric(StrEnum):
    """How an answer is scored against its reference, 0..1; the value is its key in JSON."""

    heading: str  # in tables
    score: Callable[[str, str], float]  # score(prediction, reference)
    test: str  # what paired_test does with its scores
    judges: str  # the kind of task whose gains and verdict use it; "" if it is only shown
    definition: str  # in evaluation.json; "" if the heading says all
    needs_json: bool  # whether it compares fields

    def __new__(
        cls,
        key: str,
        heading: str,
        score: Callable[[str, str], float],
        test: str,
        judges: str = "",
        definition: str = "",
        needs_json: bool = False,
    ) -> Self:
        metric = str.__new__(cls, key)
        metric._value_ = key
        metric.heading, metric.score, metric.test = heading, score, test
        metric.judges, metric.definition, metric.needs_json = judges, definition, needs_json
        return metric

    EXACT_MATCH = "exact_match", "Exact Match", exact_match, MCNEMAR, CLASSIFICATION
    ROUGE_L = "rouge_l", "ROUGE-L", rouge_l, SIGN_CHANGES, GENERATION, "word level, F-measure (rouge-score)"
    FIELDS_RIGHT = (
        "share_of_fields_right",
        "share of fields right",
        share_of_fields_right,
        SIGN_CHANGES,
        STRUCTURED,
        "equal fields of all that the JSON of answer or right output has",
        True,
    )
    ALL_FIELDS_RIGHT = (
        "all_fields_right",
        "all fields right",
        all_fields_right,
        MCNEMAR,
        "",
        "JSON with the same fields; spacing and the order of keys do not count",
        True,
    )


METRICS = {str(metric): metric for metric in Metric}  # by their keys
METRIC_OF_KIND = {metric.judges: metric for metric in Metric if metric.judges}


def kind_of(task: Task) -> str:
    """The kind of a task, by its labels and by what its examples answer."""
    if task.is_classification:
        return CLASSIFICATION
    return STRUCTURED if shape_of([example.output for example in task.examples]) else GENERATION


def metric_of(task: Task) -> Metric:
    """The metric that a task is judged by."""
    return METRIC_OF_KIND[kind_of(task)]


def metrics_for(references: Sequence[str], judge: Metric | None = None) -> list[Metric]:
    """The metrics that score an answer with these right outputs. judge: the one that scores every row of the task.

    Those that compare fields do where every right output is a JSON object or list, or the judge compares fields.
    """
    compares_fields = (judge is not None and judge.needs_json) or all(
        parsed(reference) is not None for reference in references
    )
    return [metric for metric in Metric if compares_fields or not metric.needs_json]
