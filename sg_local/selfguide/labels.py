"""Label scores: how probable each label is as a row's answer, and how far that can be believed.

    calibrate([[-0.1, -2.4], [-0.2, -1.7]])  -> [[0.60, 0.40], [0.40, 0.60]]     the bias to label 0 is gone
    with_evidence([0.6, 0.4], made_for=1, reliable=0.9)  -> [0.14, 0.86]         in doubt the made-for label decides
    label_scores(...)  -> LabelScores(raw, calibrated, with_evidence, ...)       all of it, for curate and explain

Source: Batch Calibration (arXiv 2309.17249), here on mean log-probabilities.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

# exp(-69): a label's score below it says no more, and must not decide the mean that calibration subtracts.
_LEAST_PROBABILITY = 1e-30
# No writer is believed against everything that the judge says.
MAX_RELIABILITY = 0.95

Probabilities = list[list[float]]  # shape (n_rows, n_labels)


class Agreement(TypedDict):
    """How often labels are what the inputs were made for, as the manifest has it.

    {"share": 0.64, "n_rows": 198, "chance": 0.25, "p": 1.2e-31, "reliability": 0.7263, "used_as_filter": false}
    """

    share: float
    n_rows: int
    chance: float
    p: float  # probability of so many or more by chance
    reliability: float
    used_as_filter: bool  # whether rows that disagree are dropped


@dataclass(frozen=True)
class LabelScores:
    """Label probabilities of some rows in three stages, and how far they agree with the made-for labels."""

    raw: Probabilities  # as the model gave them
    calibrated: Probabilities | None  # without the bias that all rows share; None where it stays
    with_evidence: Probabilities | None  # with the made-for label; None where that says nothing
    agreed: int  # rows whose highest score, before evidence, is that of the made-for label
    reliability: float  # how often an input is of its made-for label; 1 / n_labels where that is not weighed

    @property
    def last(self) -> Probabilities:
        """Those of the last stage, which decide."""
        return self.with_evidence or self.calibrated or self.raw


def label_scores(
    rows: Sequence[Sequence[Mapping[str, float]]],
    made_for: Sequence[str | None],
    labels: Sequence[str],
    *,
    removes_bias: bool,
    weighs_evidence: bool,
) -> LabelScores:
    """The scores of at least one row: the mean over its prompts, each prompt's own bias taken out first.

    rows: `label_logprobs` of outputs.jsonl, by row and prompt a log-probability in nats for each label. made_for: the
    rows' made-for labels, which are evidence as far as they are reliable.
    """
    logprobs = [
        [[prompt[label] for label in labels] for prompt in prompts] for prompts in zip(*rows, strict=True)
    ]
    raw = _mean_of_prompts([[*map(label_probabilities, prompt)] for prompt in logprobs])
    calibrated = _mean_of_prompts([*map(calibrate, logprobs)]) if removes_bias else None
    scores = calibrated or raw
    agreed = sum(labels[row.index(max(row))] == label for row, label in zip(scores, made_for, strict=True))
    reliable = reliability(agreed, len(rows), len(labels)) if weighs_evidence else 1 / len(labels)
    believed: Probabilities | None = None
    if reliable > 1 / len(labels):
        places: dict[str | None, int] = {label: place for place, label in enumerate(labels)}
        believed = [
            with_evidence(row, places[label], reliable)
            for row, label in zip(tempered(scores, reliable), made_for, strict=True)
        ]
    return LabelScores(raw, calibrated, believed, agreed, reliable)


def _mean_of_prompts(prompts: Sequence[Probabilities]) -> Probabilities:
    return [ensemble(parts) for parts in zip(*prompts, strict=True)]


def label_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of the labels given that one of them is the answer; logprobs in nats, shape (n_labels,)."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def calibrate(rows: Sequence[Sequence[float]]) -> Probabilities:
    """Label probabilities (n_rows, n_labels) without the bias that all rows share, from log-probabilities in nats.

    Subtracts each label's mean log-probability over the batch. It assumes that the batch holds the labels in about
    equal numbers, which label quotas give.
    """
    logs = [[math.log(max(p, _LEAST_PROBABILITY)) for p in label_probabilities(row)] for row in rows]
    means = [sum(column) / len(logs) for column in zip(*logs, strict=True)]
    return [
        label_probabilities([value - mean for value, mean in zip(row, means, strict=True)]) for row in logs
    ]


def ensemble(parts: Sequence[Sequence[float]]) -> list[float]:
    """Label probabilities of several prompts as one, by the mean of their logarithms; shape (n_prompts, n_labels)."""
    logs = [[math.log(max(p, _LEAST_PROBABILITY)) for p in part] for part in parts]
    return label_probabilities([sum(column) / len(parts) for column in zip(*logs, strict=True)])


def sharpened(probabilities: Sequence[float], temperature: float) -> list[float]:
    """Probabilities with their logarithms divided by a temperature over 0: under 1 it takes doubt away."""
    return label_probabilities([math.log(max(p, _LEAST_PROBABILITY)) / temperature for p in probabilities])


def tempered(rows: Sequence[Sequence[float]], mean_confidence: float) -> Probabilities:
    """Label probabilities at the one temperature at which the likeliest label has this probability on average.

    A small model's calibrated scores are flat, whatever it knows; this makes them as sure as it is right.
    """
    low, high = -5.0, 5.0  # of the temperature's logarithm: 0.007 .. 148

    def at(log_temperature: float) -> Probabilities:
        return [sharpened(row, math.exp(log_temperature)) for row in rows]

    for _ in range(30):
        middle = (low + high) / 2
        if sum(map(max, at(middle))) / len(rows) > mean_confidence:
            low = middle
        else:
            high = middle
    return at((low + high) / 2)


def with_evidence(probabilities: Sequence[float], made_for: int, reliable: float) -> list[float]:
    """Label probabilities once it is known which label the input was made for (Bayes), by a writer so reliable."""
    others = (1 - reliable) / (len(probabilities) - 1)
    weighted = [p * (reliable if label == made_for else others) for label, p in enumerate(probabilities)]
    return [value / sum(weighted) for value in weighted]


def margin(probabilities: Sequence[float]) -> float:
    """How far the likeliest of at least two labels is ahead of the second, 0..1."""
    first, second = sorted(probabilities, reverse=True)[:2]
    return first - second


def reliability(agreed: int, n_rows: int, n_labels: int) -> float:
    """How often a made input is of the label it was made for, 1 / n_labels .. MAX_RELIABILITY.

    agreed is how many of n_rows are annotated with that label. Writer and judge are the same model, so the estimate
    takes them for equally reliable, and their errors for independent: agreement = r² + (1 - r)² / (n_labels - 1).
    The root is steep at chance; the lower end of the agreement's 95 % Wilson interval keeps luck from counting.
    """
    from scipy.stats import binomtest

    if n_rows == 0:
        return 1 / n_labels
    agreement = float(binomtest(agreed, n_rows).proportion_ci(method="wilson").low)
    inside = 1 - n_labels * (1 - agreement * (n_labels - 1))
    return min(MAX_RELIABILITY, (1 + math.sqrt(max(0.0, inside))) / n_labels)


def follows_labels(agreed: int, n_rows: int, n_labels: int) -> bool:
    """Whether the base writes inputs for the label that it is asked for: agreement clearly over chance.

    The lower end of the agreement's 95 % Wilson interval must reach half of the way from chance to 1: then a
    disagreement speaks against the row more often than not.
    """
    from scipy.stats import binomtest

    if n_rows == 0:
        return False
    low = binomtest(agreed, n_rows).proportion_ci(method="wilson").low
    return bool(low >= (1 + 1 / n_labels) / 2)


def agreement_by_chance(agreed: int, n_rows: int, n_labels: int) -> float:
    """How probable it is that so many of at least one row, or more, agree by chance (exact binomial test), 0..1."""
    from scipy.stats import binomtest

    return float(binomtest(agreed, n_rows, 1 / n_labels, alternative="greater").pvalue)
