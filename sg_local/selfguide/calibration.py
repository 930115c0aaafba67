"""How far a model's label probabilities can be trusted, and what is gained by answering the sure rows alone.

    calibration_error([0.9, 0.8, 0.7], [True, True, False])      0.33: it is surer than it is right
    risk_coverage([0.9, 0.8, 0.7], [True, True, False])
    -> [{"share": 1.0, "right": 0.66667, "least_probability": 0.7}, ..., {"share": 0.5, "right": 1.0, ...}]
    fitted_temperature([{"a": -0.1, "b": -2.4}, ...], ["b", ...])    1.9: at that it is as right as it is sure

Sources: expected calibration error and temperature scaling, Guo et al. (arXiv 1706.04599); risk and coverage, Geifman
and El-Yaniv (arXiv 1705.08500).
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

from sg_local.selfguide.labels import label_probabilities
from sg_local.selfguide.metrics import normalize

N_BINS = 10
# In evaluation.json, beside the number.
CALIBRATION_ERROR = "expected calibration error, 10 bins of equal width (arXiv 1706.04599)"
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the rows, the surest first
# Beyond these a few rows would decide: so many right in a row say little of how sure a model may be.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.5, 10.0


class Covered(TypedDict):
    """If only the surest share of the rows is answered: how many of these are right, and the least sure among them."""

    share: float
    right: float
    least_probability: float


class Calibration(TypedDict):
    """What evaluation.json says of a contender's label probabilities.

    calibration_error_at_temperature: each half of the rows at the temperature that fits the other half.
    """

    calibration_error: float
    temperature: float
    calibration_error_at_temperature: float
    risk_coverage: list[Covered]


def calibration_of(
    answers: Sequence[str], references: Sequence[str], label_logprobs: Sequence[Mapping[str, float]]
) -> Calibration:
    """The calibration of at least one row's answer. label_logprobs: of each row, log p of each label in nats."""
    is_right = [normalize(a) == normalize(b) for a, b in zip(answers, references, strict=True)]

    def sureness(temperatures: Sequence[float]) -> list[float]:
        return [
            probability_of(answer, at_temperature(logprobs, temperature))
            for answer, logprobs, temperature in zip(answers, label_logprobs, temperatures, strict=True)
        ]

    halves = [fitted_temperature(label_logprobs[half::2], references[half::2]) for half in (1, 0)]
    crossed = [halves[place % 2] for place in range(len(answers))]
    sure = sureness([1.0] * len(answers))
    return {
        "calibration_error": round(calibration_error(sure, is_right), 5),
        "temperature": round(fitted_temperature(label_logprobs, references), 3),
        "calibration_error_at_temperature": round(calibration_error(sureness(crossed), is_right), 5),
        "risk_coverage": risk_coverage(sure, is_right),
    }


def at_temperature(label_logprobs: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Probabilities of the labels, if one of them is the answer; over 1 a temperature makes them less certain."""
    probabilities = label_probabilities([value / temperature for value in label_logprobs.values()])
    return {label: round(value, 5) for label, value in zip(label_logprobs, probabilities, strict=True)}


def probability_of(answer: str, probabilities: Mapping[str, float]) -> float:
    """The probability of the label that an answer is; 0 for an answer that is none."""
    return next((p for label, p in probabilities.items() if normalize(label) == normalize(answer)), 0.0)


def calibration_error(probabilities: Sequence[float], is_right: Sequence[bool]) -> float:
    """How far, on average, the share of right answers is from their probability, 0..1, over at least one row."""
    bins: dict[int, list[int]] = {}
    for row, probability in enumerate(probabilities):
        bins.setdefault(min(N_BINS - 1, int(probability * N_BINS)), []).append(row)
    return sum(
        abs(sum(is_right[row] for row in rows) - sum(probabilities[row] for row in rows))
        for rows in bins.values()
    ) / len(probabilities)


def risk_coverage(probabilities: Sequence[float], is_right: Sequence[bool]) -> list[Covered]:
    """What is right among the surest rows, for each of SHARES, of at least one row."""
    order = sorted(range(len(probabilities)), key=lambda row: -probabilities[row])
    covered: list[Covered] = []
    for share in SHARES:
        surest = order[: max(1, round(share * len(order)))]
        covered.append(
            {
                "share": share,
                "right": round(sum(is_right[row] for row in surest) / len(surest), 5),
                "least_probability": round(probabilities[surest[-1]], 5),
            }
        )
    return covered


def fitted_temperature(label_logprobs: Sequence[Mapping[str, float]], references: Sequence[str]) -> float:
    """The temperature at which the references are most probable, 0.5 .. 10; 1 where no row says anything of it."""
    rows = []
    for logprobs, reference in zip(label_logprobs, references, strict=True):
        by_name = {normalize(label): value for label, value in logprobs.items()}
        if normalize(reference) in by_name:
            rows.append((by_name[normalize(reference)], [*by_name.values()]))
    if not rows:
        return 1.0

    def surprise(log_temperature: float) -> float:
        """Of the references, in nats."""
        temperature = math.exp(log_temperature)
        total = 0.0
        for right, values in rows:
            highest = max(values)
            total += (highest - right) / temperature
            total += math.log(sum(math.exp((value - highest) / temperature) for value in values))
        return total

    low, high = math.log(LEAST_TEMPERATURE), math.log(MOST_TEMPERATURE)
    for _ in range(50):  # the surprise has one minimum: it is convex in 1 / temperature
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if surprise(first) <= surprise(second):
            high = second
        else:
            low = first
    return math.exp((low + high) / 2)
