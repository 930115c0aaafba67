"""Whether differences between answers are more than chance: means with intervals, a paired test, its verdict.

mean_of([1, 1, 0, 1]) -> {"mean": 0.75, "interval_95": [0.30064, 0.95441]}
paired_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) -> 0.0625
verdict(0.0625, 0.83) -> "no difference shown"
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import TypedDict

SIGNIFICANCE = 0.05
# The two tests of paired_test: the first for scores of 0 and 1, the second for all others.
MCNEMAR, SIGN_CHANGES = "McNemar, exact", "sign changes of the differences"

_N_RESAMPLES = 10_000
_DECIMALS = 5  # of numbers in files


class Verdict(StrEnum):
    """What the paired test says of the tuned model, compared with another contender."""

    BETTER = "better"
    NO_DIFFERENCE = "no difference shown"
    WORSE = "worse"


class Mean(TypedDict):
    """A mean over rows."""

    mean: float
    interval_95: list[float]


class MeanOverTasks(TypedDict):
    """A mean over at least one task; one task has no interval."""

    mean: float
    interval_95: list[float] | None


class Difference(TypedDict):
    """The result of a paired comparison on the same rows."""

    mean: float
    interval_95: list[float]
    p: float
    verdict: str


def mean_of(scores: Sequence[float]) -> Mean:
    """The mean of at least one score, as written to files."""
    return {"mean": average(scores), "interval_95": [*map(_rounded, interval(scores))]}


def mean_over_tasks(values: Sequence[float]) -> MeanOverTasks:
    """The mean of one value per task, as written to files."""
    bounds = interval_over_tasks(values)
    return {"mean": average(values), "interval_95": [*map(_rounded, bounds)] if bounds else None}


def average(values: Sequence[float]) -> float:
    """The mean of at least one value, rounded as in files."""
    return _rounded(sum(values) / len(values))


def difference(after: Sequence[float], before: Sequence[float]) -> Difference:
    """The paired difference after - before, as written to files."""
    mean, low, high = paired_difference(after, before)
    p = paired_test(after, before)
    return {
        "mean": _rounded(mean),
        "interval_95": [_rounded(low), _rounded(high)],
        "p": float(f"{p:.3g}"),
        "verdict": verdict(p, mean),
    }


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least one score.

    Wilson's interval if all scores are 0 or 1; else a percentile bootstrap (10,000 resamples, fixed seed), which is
    too narrow for fewer than about 20 scores.
    """
    from scipy.stats import binomtest

    if all(score in (0.0, 1.0) for score in scores):
        bounds = binomtest(round(sum(scores)), len(scores)).proportion_ci(method="wilson")
        return float(bounds.low), float(bounds.high)
    return _bootstrap(scores)


def paired_difference(after: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after - before over the same rows, at least one, and its 95 % interval by bootstrap, as above."""
    differences = [a - b for a, b in zip(after, before, strict=True)]
    return (sum(differences) / len(differences), *_bootstrap(differences))


def paired_test(after: Sequence[float], before: Sequence[float]) -> float:
    """Two-sided p of "it makes no difference which of the two answered", over the same rows, at least one.

    If all scores are 0 or 1, this is McNemar's exact test: a binomial test on the rows that differ. Otherwise the
    differences change their signs at random (10,000 times, fixed seed), which is the same test by simulation. It tests
    the mean, as the interval does; Wilcoxon's ranks may point the other way.
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
    least = abs(array.sum()) * (1 - 1e-9)  # tolerance: the sum depends on the order of the numbers
    per_draw = max(1, 1_000_000 // len(array))
    as_large = 0
    for done in range(0, _N_RESAMPLES, per_draw):
        signs = rng.integers(0, 2, (min(per_draw, _N_RESAMPLES - done), len(array))) * 2 - 1
        as_large += int((abs(signs @ array) >= least).sum())
    return (as_large + 1) / (_N_RESAMPLES + 1)


def verdict(p: float, mean_difference: float) -> Verdict:
    """What a paired test says at the 5 % level.

    The test decides, not the bootstrap interval, which is too narrow if few rows differ. If 5 of 300 answers become
    right and none becomes wrong, the interval is above 0, and p = 0.06.
    """
    if p >= SIGNIFICANCE:
        return Verdict.NO_DIFFERENCE
    return Verdict.BETTER if mean_difference > 0 else Verdict.WORSE


def interval_over_tasks(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over tasks, by Student's t; None for fewer than two.

    There are few tasks, and a bootstrap of few values is too narrow.
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
    per_draw = max(1, 1_000_000 // len(array))  # resamples at once: at most 8 MB of indices
    means = np.concatenate(
        [
            array[rng.integers(0, len(array), (min(per_draw, _N_RESAMPLES - done), len(array)))].mean(axis=1)
            for done in range(0, _N_RESAMPLES, per_draw)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _rounded(value: float) -> float:
    return round(value, _DECIMALS)
