"""How good are answers: Exact Match and ROUGE-L, with intervals and a paired test.

    exact_match("Support.", "support") -> 1.0
    rouge_l("how many chapters", "how many chapters are there") -> 0.75
    paired_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) -> 0.0625
    verdict(0.0625, 0.83) -> "no difference shown"

Exact Match compares after lower-casing, removing punctuation and collapsing white space (SELF-GUIDE, section 4).
ROUGE-L is the word-level F-measure of the `rouge-score` package; the paper's code computes it over characters, so
its numbers do not compare.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Any

from sg_local.errors import InputError

SIGNIFICANCE = 0.05
VERDICTS = ("better", "no difference shown", "worse")

_N_RESAMPLES = 10_000
# Thai, Lao, Myanmar, Khmer, kana, bopomofo, Han: no spaces stand between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)


def normalize(text: str) -> str:
    """Text as Exact Match sees it; text that is punctuation alone, such as the label "+", keeps it."""
    lowered = unicodedata.normalize("NFC", text).lower()
    plain = "".join(character for character in lowered if not _is_punctuation(character))
    return " ".join(plain.split()) or " ".join(lowered.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the normalized texts are equal, else 0.0."""
    return float(normalize(prediction) == normalize(reference))


def is_label(answer: str, labels: Sequence[str]) -> bool:
    """Whether an answer is one of the labels, as Exact Match sees it."""
    return normalize(answer) in {normalize(label) for label in labels}


def label_distance(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> float:
    """How far the answers' label distribution is from the references': total variation distance, 0..1.

    It is half the sum of the differences of the shares. What is no label is one class more.
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
) -> dict[str, dict[str, int]]:
    """For each label the rows that have it, the answers that give it, and how many of these are right.

    {"refund": {"rows": 25, "given": 31, "right": 22}, ...}: precision is right / given, recall is right / rows.
    Labels that no row has and no answer gives are left out.
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

    English text gives the tokens of rouge-score's own tokenizer, which drops all but a-z and 0-9. In scripts without
    spaces each character is a word, as is usual for Chinese, and so is each emoji.
    """
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    found: list[str] = []
    before = ""  # what the character before was part of: a "word", a "unit" of its own, or neither
    for character in unicodedata.normalize("NFC", text).lower():
        category = unicodedata.category(character)
        is_unit = category == "So" or _SPACELESS.match(character)
        if category[0] == "M" and before:  # accents and vowel signs belong to the letter before
            found[-1] += character
        elif is_unit and category[0] in "LNS":
            found.append(character)
            before = "unit"
        elif category[0] not in "LN":
            before = ""
        elif before == "word":
            found[-1] += character
        else:
            found.append(character)
            before = "word"
    return found


class _Tokenizer:
    """What rouge-score asks for in place of its own."""

    tokenize = staticmethod(words)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


def rouge_l(prediction: str, reference: str) -> float:
    """Word-level ROUGE-L F-measure, 0..1; Exact Match where neither text has a word."""
    if not words(prediction) and not words(reference):
        return exact_match(prediction, reference)
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least one score.

    Wilson's where all scores are 0 or 1, else a percentile bootstrap (10,000 resamples, fixed seed), which is too
    narrow for fewer than about 20 scores.
    """
    from scipy.stats import binomtest

    if all(score in (0.0, 1.0) for score in scores):
        found = binomtest(round(sum(scores)), len(scores)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    return _bootstrap(scores)


def paired_difference(after: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after - before over the same rows, at least one, and its 95 % interval by bootstrap, as above."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    return (sum(differences) / len(differences), *_bootstrap(differences))


def paired_test(after: Sequence[float], before: Sequence[float]) -> float:
    """Two-sided p of "it makes no difference which of the two answered", over the same rows, at least one.

    Where all scores are 0 or 1 it is McNemar's exact test: the binomial one of the rows where they differ. Else each
    row's difference changes its sign at random (10,000 times, fixed seed), which is the same test by simulation.
    It is about the mean, as the interval is; Wilcoxon's ranks can point to the other side.
    """
    differences = [a - b for a, b in zip(after, before, strict=True) if a != b]
    if not differences:
        return 1.0
    if all(difference in (-1.0, 1.0) for difference in differences):
        from scipy.stats import binomtest

        return float(binomtest(differences.count(1.0), len(differences)).pvalue)
    import numpy as np

    rng = np.random.default_rng(0)
    array = np.asarray(differences)
    least = abs(array.sum()) * (1 - 1e-9)  # sums of the same numbers in another order are as large
    per_draw = max(1, 1_000_000 // len(array))
    as_large = 0
    for done in range(0, _N_RESAMPLES, per_draw):
        signs = rng.integers(0, 2, (min(per_draw, _N_RESAMPLES - done), len(array))) * 2 - 1
        as_large += int((abs(signs @ array) >= least).sum())
    return (as_large + 1) / (_N_RESAMPLES + 1)


def verdict(p: float, mean_difference: float) -> str:
    """What a paired test says, one of VERDICTS.

    The test decides, not the bootstrap interval: with few rows that differ the interval is too narrow. Five
    answers turned right of 300, and none wrong, have an interval above 0 and p = 0.06.
    """
    if p >= SIGNIFICANCE:
        return VERDICTS[1]
    return VERDICTS[0] if mean_difference > 0 else VERDICTS[2]


def interval_over_tasks(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over tasks, by Student's t; None for fewer than two.

    Tasks are few, and a bootstrap of few values is too narrow.
    """
    from statistics import mean, stdev

    from scipy.stats import t

    if len(values) < 2:
        return None
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    import numpy as np

    rng = np.random.default_rng(0)
    array = np.asarray(values)
    per_draw = max(1, 1_000_000 // len(array))  # resamples at once: 8 MB of indices, however many values
    means = np.concatenate(
        [
            array[rng.integers(0, len(array), (min(per_draw, _N_RESAMPLES - done), len(array)))].mean(axis=1)
            for done in range(0, _N_RESAMPLES, per_draw)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
