"""Label scores: how probable each label is as a row's answer, without bias, and with the made-for label.

    calibrate([[-0.1, -2.4], [-0.2, -1.7]])  -> [[0.60, 0.40], [0.40, 0.60]]     the bias to label 0 is gone
    with_evidence([0.6, 0.4], made_for=1, reliable=0.9)  -> [0.14, 0.86]         in doubt, the made-for label decides
    label_scores(...)  -> LabelScores(raw, calibrated, with_evidence, ...)       for curate and explain

Source: Batch Calibration (arXiv 2309.17249), here on mean log-probabilities. Its one assumption is that the labels of
a batch are equally frequent. Where a user knows how frequent they are among real inputs, their biases are those with
which as many rows get each label (optimal transport by Sinkhorn's iteration, as in arXiv 1306.0895).
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from sg_local.selfguide.fitted import fitted_scores

# exp(-69): a lower probability means the same, and must not decide the mean that calibration subtracts.
_LEAST_PROBABILITY = 1e-30
# A made-for label never outweighs all that the scores say.
MAX_RELIABILITY = 0.95
# So many rows count as much as what is known without them: biases of a few rows are mostly chance.
SHRINKING_ROWS = 20
MAX_P_OF_EQUAL_LABELS = 0.001
MAX_P_OF_AGREEMENT = 0.05  # of labels and what inputs were made for; above it may be chance
MAX_P_OF_FITTED = 0.01  # the same of a map, which decides alone
# "Fair" agreement begins at 0.2 (Landis and Koch, 1977). On real inputs of seven tasks the prompts had 0.08, 0.18 and
# 0.48 where their labels were chance, and 0.31 to 0.54 elsewhere (tests/benchmarks/RESULTS.md).
LEAST_KAPPA = 0.25
_TRANSPORT_SHARPNESS = (
    10  # how decided rows are while biases are fitted to shares, in deviations of the scores
)
_TRANSPORT_STEPS = 200

Probabilities = list[list[float]]  # shape (n_rows, n_labels)


class Agreement(TypedDict):
    """How often annotated and made-for label agree, as in the manifest.

    {"share": 0.64, "n_rows": 198, "chance": 0.25, "p": 1.2e-31, "reliability": 0.7263, "used_as_filter": false}
    """

    share: float
    n_rows: int
    chance: float
    p: float  # probability that so many or more agree by chance
    reliability: float
    used_as_filter: bool  # whether rows that disagree are dropped


class Known(NamedTuple):
    """What is known beside the label scores of made inputs."""

    is_real: Sequence[bool] = ()  # for each row, whether its input is a real one; (): none is
    shares: Sequence[float] = ()  # of the labels among real inputs; (): equal
    gold: Sequence[
        tuple[Sequence[Mapping[str, float]], str]
    ] = ()  # scores, by prompt, of rows with a known label


NOTHING_KNOWN = Known()


@dataclass(frozen=True)
class LabelScores:
    """Label probabilities of some rows: raw, calibrated, with evidence; and their agreement with made-for labels."""

    raw: Probabilities  # as the model gave them
    calibrated: Probabilities | None  # without the bias that all rows share; None if it is not removed
    with_evidence: Probabilities | None  # with the made-for label; None if that is no evidence
    agreed: int  # rows whose made-for label has the highest score before evidence
    reliability: float  # how often an input fits its made-for label; 1 / n_labels if that is no evidence
    real_kappa: (
        float | None
    )  # how far the prompts agree on real inputs; None with one prompt or few real ones

    @property
    def last(self) -> Probabilities:
        """The last of the three, which decide."""
        return self.with_evidence or self.before_evidence

    @property
    def before_evidence(self) -> Probabilities:
        """What the scores alone say."""
        return self.calibrated or self.raw


def label_scores(
    rows: Sequence[Sequence[Mapping[str, float]]],
    made_for: Sequence[str | None],
    labels: Sequence[str],
    *,
    removes_bias: bool,
    weighs_evidence: bool,
    known: Known = NOTHING_KNOWN,
) -> LabelScores:
    """The scores of at least one row: the mean over its prompts, after the bias of each prompt is removed.

    Made and real inputs are different batches, and have biases of their own.

    rows: `label_logprobs` of outputs.jsonl: for each row and prompt, the log-probability of each label in nats.
    made_for: the made-for label of each row, evidence that is weighted by its reliability; None: it has none.
    """
    by_row = [[[prompt[label] for label in labels] for prompt in prompts] for prompts in rows]
    by_prompt = [*zip(*by_row, strict=True)]
    places: dict[str | None, int] = {label: place for place, label in enumerate(labels)}
    asked_for = [places.get(label) for label in made_for]
    real_kappa: float | None = None
    raw = _mean_of_prompts([[*map(label_probabilities, prompt)] for prompt in by_prompt])
    calibrated: Probabilities | None = None
    if removes_bias:
        gold_rows = [[[prompt[label] for label in labels] for prompt in prompts] for prompts, _ in known.gold]
        gold_by_prompt = [*zip(*gold_rows, strict=True)] or [()] * len(by_prompt)
        answers = [labels.index(label) for _, label in known.gold]
        unbiased = [
            _calibrated(prompt, known, gold, answers)
            for prompt, gold in zip(by_prompt, gold_by_prompt, strict=True)
        ]
        calibrated = _mean_of_prompts(unbiased)
        real_kappa = _real_kappa(unbiased, known.is_real)
        for number, row in _mended(by_row, asked_for, known, gold_rows, answers).items():
            calibrated[number] = row
    scores = calibrated or raw
    agreed = sum(labels[row.index(max(row))] == label for row, label in zip(scores, made_for, strict=True))
    n_made_for = sum(label is not None for label in made_for)
    reliable = reliability(agreed, n_made_for, len(labels)) if weighs_evidence else 1 / len(labels)
    posterior: Probabilities | None = None
    if reliable > 1 / len(labels):
        posterior = [
            row if place is None else with_evidence(row, place, reliable)
            for row, place in zip(tempered(scores, reliable), asked_for, strict=True)
        ]
    return LabelScores(raw, calibrated, posterior, agreed, reliable, real_kappa)


def _real_kappa(prompts: Sequence[Probabilities], is_real: Sequence[bool]) -> float | None:
    """Cohen's kappa of the likeliest labels of real rows by two prompts, the mean over all pairs of prompts."""
    answers = [
        [row.index(max(row)) for row, real in zip(rows, is_real, strict=True) if real]
        for rows in prompts
        if is_real
    ]
    if len(answers) < 2 or len(answers[0]) < SHRINKING_ROWS:
        return None
    pairs = list(itertools.combinations(answers, 2))
    return sum(kappa(one, other) for one, other in pairs) / len(pairs)


def kappa(one: Sequence[int], other: Sequence[int]) -> float:
    """Cohen's kappa: how far two judges of the same rows agree beyond chance; 1: always, 0: as by chance.

    Cohen, "A coefficient of agreement for nominal scales", 1960. Judges that give all rows one label agree by chance.
    """
    n_rows = len(one)
    counts, others = Counter(one), Counter(other)
    chance = sum(counts[answer] * others[answer] for answer in counts) / n_rows**2
    same = sum(a == b for a, b in zip(one, other, strict=True)) / n_rows
    return (same - chance) / (1 - chance) if chance < 1 else 0.0


def _mended(
    rows: Sequence[Sequence[Sequence[float]]],
    made_for: Sequence[int | None],
    known: Known,
    gold: Sequence[Sequence[Sequence[float]]],
    gold_answers: Sequence[int],
) -> dict[int, list[float]]:
    """Calibrated probabilities of real rows, by place, with what made rows teach of the labels (fitted.py).

    Empty where they teach nothing. Made rows keep theirs: what they were made for is evidence for them already.
    """
    real = [place for place, is_real in enumerate(known.is_real) if is_real]
    made = [(place, label) for place, label in enumerate(made_for) if label is not None]
    if len(real) < SHRINKING_ROWS or not made:
        return {}
    logs = [[_logs(prompt) for prompt in row] for row in rows]
    fitted = fitted_scores(
        [logs[place] for place, _ in made],
        [label for _, label in made],
        [*(logs[place] for place in real), *([_logs(prompt) for prompt in row] for row in gold)],
    )
    if not fitted or agreement_by_chance(fitted.agreed, len(made), len(rows[0][0])) > MAX_P_OF_FITTED:
        return {}
    own, of_gold = fitted.scores[: len(real)], fitted.scores[len(real) :]
    all_real = known._replace(is_real=[True] * len(real))
    return dict(zip(real, _calibrated(own, all_real, of_gold, gold_answers), strict=True))


def _mean_of_prompts(prompts: Sequence[Probabilities]) -> Probabilities:
    return [ensemble(parts) for parts in zip(*prompts, strict=True)]


def label_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of the labels, if one of them is the answer; logprobs in nats, shape (n_labels,)."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def calibrate(rows: Sequence[Sequence[float]]) -> Probabilities:
    """Label probabilities (n_rows, n_labels) without the bias that all rows share, from log-probabilities in nats.

    Subtracts each label's mean log-probability over the rows. This assumes that the labels are about equally frequent,
    since inputs are made for each label in turn.
    """
    return _calibrated(rows, NOTHING_KNOWN, [], [])


def _calibrated(
    rows: Sequence[Sequence[float]],
    known: Known,
    gold: Sequence[Sequence[float]],
    gold_answers: Sequence[int],
) -> Probabilities:
    """The same by one prompt, each row without the bias of its batch: of made inputs, or of real ones.

    gold: the scores of labelled rows by that prompt; gold_answers: the places of their labels. They are real, and
    do not correct made inputs: by 30 of them, labels fit what inputs were made for in 0.55 of the rows, and not in
    0.57 (mean of seven tasks; agnews 0.70 and 0.77).
    """
    logs = [_logs(row) for row in rows]
    is_real = [*known.is_real] or [False] * len(rows)
    made = [row for row, real in zip(logs, is_real, strict=True) if not real]
    real = [row for row, real in zip(logs, is_real, strict=True) if real]
    of_made = _means(made)
    of_real = biases_of_shares(real, known.shares) if known.shares and real else _means(real)
    if made and real:
        of_real = _shrunk(of_real, len(real), of_made)
    if real and not known.shares:  # which say more
        gold_means = _means_of_equal_labels([_logs(row) for row in gold], gold_answers)
        of_real = _shrunk(gold_means, len(gold), of_real) if gold_means else of_real
    biases = [of_real if real else of_made for real in is_real]
    return [
        label_probabilities([value - bias for value, bias in zip(row, own, strict=True)])
        for row, own in zip(logs, biases, strict=True)
    ]


def _logs(logprobs: Sequence[float]) -> list[float]:
    return [math.log(max(p, _LEAST_PROBABILITY)) for p in label_probabilities(logprobs)]


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _means_of_equal_labels(rows: Sequence[Sequence[float]], answers: Sequence[int]) -> list[float]:
    """Means over labelled rows in which each label counts the same; [] where a label has none."""
    if not rows or len(set(answers)) < len(rows[0]):
        return []
    by_label = [
        _means([row for row, answer in zip(rows, answers, strict=True) if answer == label])
        for label in range(len(rows[0]))
    ]
    return _means(by_label)


def _shrunk(biases: Sequence[float], n_rows: int, towards: Sequence[float]) -> list[float]:
    """Biases of n_rows, drawn towards others the more the fewer rows there are."""
    weight = n_rows / (n_rows + SHRINKING_ROWS)
    return [weight * one + (1 - weight) * other for one, other in zip(biases, towards, strict=True)]


def biases_of_shares(rows: Sequence[Sequence[float]], shares: Sequence[float]) -> list[float]:
    """The biases without which each label is the likeliest one of its share of the rows (n_rows, n_labels).

    rows: log-probabilities in nats; shares: of the labels, over 0, adding up to 1.
    """
    import numpy as np

    logs = np.asarray(rows)
    scale = max(float((logs - logs.mean(axis=0)).std()), 1e-6) / _TRANSPORT_SHARPNESS
    wanted, biases = np.log(np.asarray(shares)), logs.mean(axis=0) / scale
    for _ in range(_TRANSPORT_STEPS):
        values = logs / scale - biases
        weights = np.exp(values - values.max(axis=1, keepdims=True))
        found = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        biases = biases + np.log(np.maximum(found, _LEAST_PROBABILITY)) - wanted
    return [float(bias) for bias in biases * scale]


def ensemble(parts: Sequence[Sequence[float]]) -> list[float]:
    """Combines the label probabilities (n_prompts, n_labels) of several prompts, by the mean of their logarithms."""
    logs = [[math.log(max(p, _LEAST_PROBABILITY)) for p in part] for part in parts]
    return label_probabilities([sum(column) / len(parts) for column in zip(*logs, strict=True)])


def sharpened(probabilities: Sequence[float], temperature: float) -> list[float]:
    """Probabilities at a temperature over 0, which divides their logarithms; under 1 makes them more certain."""
    return label_probabilities([math.log(max(p, _LEAST_PROBABILITY)) / temperature for p in probabilities])


def tempered(rows: Sequence[Sequence[float]], mean_confidence: float) -> Probabilities:
    """Label probabilities at the temperature at which the highest has this mean over the rows.

    The calibrated scores of a small model are flat, whatever it knows. This makes them as certain as they are right.
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
    """Label probabilities given the made-for label (Bayes), which is right with probability `reliable`."""
    others = (1 - reliable) / (len(probabilities) - 1)
    weighted = [p * (reliable if label == made_for else others) for label, p in enumerate(probabilities)]
    return [value / sum(weighted) for value in weighted]


def margin(probabilities: Sequence[float]) -> float:
    """The distance between the two highest of at least two probabilities, 0..1."""
    first, second = sorted(probabilities, reverse=True)[:2]
    return first - second


def reliability(agreed: int, n_rows: int, n_labels: int) -> float:
    """How often a made input fits its made-for label, 1 / n_labels .. MAX_RELIABILITY.

    agreed: how many of n_rows are annotated with that label. The same model writes and annotates, so the estimate
    assumes that both are equally reliable and err independently: agreement = r² + (1 - r)² / (n_labels - 1). The
    root is steep near chance, so the lower end of the agreement's 95 % Wilson interval is used: luck counts for
    nothing.
    """
    from scipy.stats import binomtest

    if n_rows == 0:
        return 1 / n_labels
    agreement = float(binomtest(agreed, n_rows).proportion_ci(method="wilson").low)
    inside = 1 - n_labels * (1 - agreement * (n_labels - 1))
    return min(MAX_RELIABILITY, (1 + math.sqrt(max(0.0, inside))) / n_labels)


def follows_labels(agreed: int, n_rows: int, n_labels: int) -> bool:
    """Whether the base writes inputs that fit their made-for labels: the agreement is clearly above chance.

    The lower end of the agreement's 95 % Wilson interval must be at least half-way from chance to 1. Then most rows
    that disagree are wrong.
    """
    from scipy.stats import binomtest

    if n_rows == 0:
        return False
    low = binomtest(agreed, n_rows).proportion_ci(method="wilson").low
    return bool(low >= (1 + 1 / n_labels) / 2)


def are_unequal(answers: Sequence[str], labels: Sequence[str]) -> bool:
    """Whether answers speak clearly against labels that occur equally often (chi-squared test, p < 0.001)."""
    from scipy.stats import chisquare

    if len(answers) < 5 * len(labels):  # fewer than the test needs
        return False
    return bool(chisquare([answers.count(label) for label in labels]).pvalue < MAX_P_OF_EQUAL_LABELS)


def agreement_by_chance(agreed: int, n_rows: int, n_labels: int) -> float:
    """The probability that so many of at least one row, or more, agree by chance (exact binomial test), 0..1."""
    from scipy.stats import binomtest

    return float(binomtest(agreed, n_rows, 1 / n_labels, alternative="greater").pvalue)
