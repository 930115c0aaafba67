"""Which answers to believe: votes, calibrated label scores, and equal numbers for every label.

    vote(["at noon", "at noon", "12"])       -> ("at noon", 0.67)
    consensus(["a red car", "red car", "x"]) -> ("a red car", 0.4)               near answers agree in part
    most_informed([-9.0, -2.0], [-30.0, -2.1], [7, 1]) -> (0, 3.0)               said by the input, not by habit
    calibrate([[-0.1, -2.4], [-0.2, -1.7]])  -> [[0.60, 0.40], [0.40, 0.60]]     the bias to label 0 is gone

Sources: self-consistency as in SELF-GUIDE section 3.2 (the shortest among equals); minimum Bayes risk decoding
(Kumar and Byrne 2004; for language models arXiv 2310.01387); domain-conditional pointwise mutual information
(Holtzman et al. 2021, arXiv 2104.08315); Batch Calibration (arXiv 2309.17249), here on mean
log-probabilities; balancing as in SELF-GUIDE, by repeating rows instead of dropping them.
"""

import math
from collections import Counter
from collections.abc import Sequence

from sg_local.selfguide.metrics import rouge_l

# exp(-69): a label's score below it says no more, and must not decide the mean that calibration subtracts.
_LEAST_PROBABILITY = 1e-30
# No writer is believed against everything that the judge says.
MAX_RELIABILITY = 0.95


def vote(samples: Sequence[str]) -> tuple[str, float]:
    """The commonest answer and its share of all samples, of which there is at least one.

    Among equals the shortest answer wins, then the first.
    """
    counts = Counter(sample.strip() for sample in samples)
    best = min(counts, key=lambda answer: (-counts[answer], len(answer)))
    return best, counts[best] / len(samples)


def vote_margin(samples: Sequence[str]) -> float:
    """How far the commonest answer's share of the samples is ahead of the next one's, 0..1."""
    counts = [count for _, count in Counter(sample.strip() for sample in samples).most_common(2)]
    return (counts[0] - sum(counts[1:])) / len(samples)


def consensus(samples: Sequence[str]) -> tuple[str, float]:
    """The answer that is most like the other samples, and its mean ROUGE-L with them, 0..1.

    Long answers are hardly ever equal, and a vote among ten different ones is chance. Among equals the commonest
    answer wins, then the shortest, then the first. A single sample agrees with itself.
    """
    answers = [sample.strip() for sample in samples]
    counts = Counter(answers)
    agreements = {answer: likeness(answer, answers) for answer in counts}
    best = min(counts, key=lambda answer: (-agreements[answer], -counts[answer], len(answer)))
    return best, agreements[best]


def likeness(answer: str, samples: Sequence[str]) -> float:
    """Mean ROUGE-L of an answer, which is one of the samples, with the others, 0..1; 1 for a single sample."""
    others = Counter(sample.strip() for sample in samples)
    others[answer] -= 1
    n_others = others.total()
    if n_others == 0:
        return 1.0
    return (
        sum(
            count * (1.0 if other == answer else rouge_l(answer, other))
            for other, count in others.items()
            if count
        )
        / n_others
    )


def most_informed(
    logprobs: Sequence[float], logprobs_alone: Sequence[float], n_tokens: Sequence[int]
) -> tuple[int, float]:
    """Which of at least one answer the input makes likelier most, and by how much: nats for each of its tokens.

    logprobs: log p(answer | input), logprobs_alone: the same with nothing in the input's place. What a model says by
    habit ("no.", its own name) is likely either way; this is for free text what calibration is for labels.
    """
    gains = [
        (own - alone) / count for own, alone, count in zip(logprobs, logprobs_alone, n_tokens, strict=True)
    ]
    best = max(range(len(gains)), key=lambda index: gains[index])
    return best, gains[best]


def label_probabilities(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of the labels given that one of them is the answer; logprobs in nats, shape (n_labels,)."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return [weight / total for weight in weights]


def calibrate(rows: Sequence[Sequence[float]]) -> list[list[float]]:
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


def margin(probabilities: Sequence[float]) -> float:
    """How far the likeliest of at least two labels is ahead of the second, 0..1."""
    first, second = sorted(probabilities, reverse=True)[:2]
    return first - second


def most_confident(labels: Sequence[str], margins: Sequence[float], share: float) -> list[bool]:
    """Whether each row is among the most confident share of its own label; at least one row of each stays."""
    keep = [False] * len(labels)
    for label in set(labels):
        own = sorted((i for i, other in enumerate(labels) if other == label), key=lambda i: (-margins[i], i))
        for index in own[: max(1, round(share * len(own)))]:
            keep[index] = True
    return keep


def follows_labels(agreed: int, n_rows: int, n_labels: int) -> bool:
    """Whether the student writes inputs for the label it is asked for: agreement clearly over chance.

    The lower end of the agreement's 95 % Wilson interval must reach half of the way from chance to 1: then a
    disagreement speaks against the row more often than not.
    """
    from scipy.stats import binomtest

    if n_rows == 0:
        return False
    low = binomtest(agreed, n_rows).proportion_ci(method="wilson").low
    return bool(low >= (1 + 1 / n_labels) / 2)


def n_as_asked(rows: Sequence[Sequence[float]], made_for: Sequence[int]) -> int:
    """How many rows' likeliest label, calibrated, is the one that the input was made for.

    rows: log-probabilities in nats, shape (n_rows, n_labels).
    """
    return sum(own.index(max(own)) == asked for own, asked in zip(calibrate(rows), made_for, strict=True))


def agreement_by_chance(agreed: int, n_rows: int, n_labels: int) -> float:
    """How probable it is that so many of at least one row, or more, agree by chance (exact binomial test), 0..1."""
    from scipy.stats import binomtest

    return float(binomtest(agreed, n_rows, 1 / n_labels, alternative="greater").pvalue)


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


def tempered(rows: Sequence[Sequence[float]], mean_confidence: float) -> list[list[float]]:
    """Label probabilities at the one temperature at which the likeliest label has this probability on average.

    A small model's calibrated scores are flat, whatever it knows; this makes them as sure as it is right.
    """
    low, high = -5.0, 5.0  # of the temperature's logarithm: 0.007 .. 148

    def at(log_temperature: float) -> list[list[float]]:
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


def in_turns(labels: Sequence[str]) -> list[int]:
    """The places of rows in another order: each label in turn, as long as it lasts; a label's own keep their order."""
    seen: Counter[str] = Counter()
    turns = []
    for label in labels:
        turns.append(seen[label])
        seen[label] += 1
    return sorted(range(len(labels)), key=lambda place: (turns[place], place))


def balancing_copies(labels: Sequence[str], max_copies: int) -> list[int]:
    """How often each row is shown so that all labels that occur are shown equally often; 0 drops a row.

    Rows come most confident first. The commonest label sets the number, unless the rarest would be repeated more
    than max_copies times: then the others give up their last rows.
    """
    if not labels:
        return []
    counts = Counter(labels)
    target = min(max(counts.values()), max_copies * min(counts.values()))
    seen: Counter[str] = Counter()
    copies = []
    for label in labels:
        whole, rest = divmod(target, counts[label])
        copies.append(whole + (seen[label] < rest))
        seen[label] += 1
    return copies
