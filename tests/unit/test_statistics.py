"""Intervals, by their formulas and their odds; paired tests, by published numbers."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.selfguide.statistics import (
    Verdict,
    difference,
    interval,
    interval_over_tasks,
    mean_of,
    mean_over_tasks,
    paired_difference,
    paired_test,
    verdict,
)


def wilson(successes: int, n: int) -> tuple[float, float]:
    z, p = 1.959964, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (0, 10), (10, 10), (150, 300), (1, 1)])
def test_interval_of_right_and_wrong_is_wilsons(successes: int, n: int):
    scores = [1.0] * successes + [0.0] * (n - successes)
    assert interval(scores) == pytest.approx(wilson(successes, n), abs=1e-6)


def test_interval_of_other_scores_is_about_two_standard_errors():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(300)]
    mean = sum(scores) / 300
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / 300 / 300)
    low, high = interval(scores)
    # 10,000 resamples place a 2.5 % quantile within 0.03 standard errors; 0.15 is five times that.
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert interval(scores) == (low, high)


def test_interval_of_equal_scores_is_a_point():
    assert interval([0.25] * 50) == (0.25, 0.25)


def test_paired_difference():
    before = [0.0, 1.0] * 100
    mean, low, high = paired_difference([1.0] * 150 + [0.0] * 50, before)
    assert mean == pytest.approx(0.25)
    assert 0.1 < low < 0.25 < high < 0.4
    assert paired_difference(before, before) == (0, 0, 0)
    swapped = paired_difference(before, [1.0] * 150 + [0.0] * 50)
    assert swapped[0] == pytest.approx(-0.25)
    assert swapped[2] < 0


def test_pairs_make_the_interval_narrower():
    # Rows that differ much, and a gain of 0.1 on nearly every one: the means' own intervals overlap.
    rng = random.Random(1)
    before = [rng.random() * 0.8 for _ in range(60)]
    after = [value + 0.1 + rng.gauss(0, 0.02) for value in before]
    assert interval(after)[0] < interval(before)[1]
    assert paired_difference(after, before)[1] > 0.08


def test_paired_difference_needs_the_same_rows():
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 0.0])


def scores(right: int, wrong: int, same: int = 0) -> tuple[list[float], list[float]]:
    """Scores after and before where so many rows became right, became wrong, and stayed."""
    after = [1.0] * right + [0.0] * wrong + [1.0] * same
    return after, [0.0] * right + [1.0] * wrong + [1.0] * same


@pytest.mark.parametrize(
    ("right", "wrong", "p"),
    [
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),
        (0, 0, 1.0),
        # Agresti, Categorical Data Analysis (2002), table 10.1: approval of a prime minister, asked twice
        (86, 150, 3.7e-5),
    ],
)
def test_paired_test_of_right_and_wrong_is_mcnemars_exact_one(right: int, wrong: int, p: float):
    assert paired_test(*scores(right, wrong)) == pytest.approx(p, rel=0.01)
    assert paired_test(*scores(wrong, right, same=500)) == pytest.approx(p, rel=0.01)


def test_paired_test_of_other_scores_is_the_same_test_by_simulation():
    # Halved scores are no longer 0 or 1, and the test does not depend on scale.
    for right, wrong in ((8, 2), (20, 12), (5, 0)):
        after, before = scores(right, wrong)
        simulated = paired_test([value / 2 for value in after], [value / 2 for value in before])
        # 10,000 draws: a standard error of at most 0.005; 0.025 is five of them.
        assert simulated == pytest.approx(paired_test(after, before), abs=0.025)


def test_paired_test_finds_a_small_steady_gain_and_not_a_large_unsteady_one():
    rng = random.Random(2)
    before = [rng.random() for _ in range(100)]
    assert paired_test([value + 0.05 + rng.gauss(0, 0.05) for value in before], before) < 0.001
    assert paired_test([value + rng.gauss(0, 1) for value in before], before) > 0.01
    after = [value + rng.gauss(0.03, 0.2) for value in before]
    assert paired_test(after, before) == paired_test(after, before)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_paired_test_does_not_care_which_comes_first(pairs: list[tuple[float, float]]):
    after, before = zip(*pairs, strict=True)
    p = paired_test(after, before)
    assert 0 < p <= 1
    assert p == paired_test(before, after)


def test_the_test_decides_where_the_interval_is_too_narrow():
    after, before = scores(5, 0, same=295)
    mean, low, _ = paired_difference(after, before)
    assert low > 0
    assert verdict(paired_test(after, before), mean) == "no difference shown"
    after, before = scores(6, 0, same=294)
    assert verdict(paired_test(after, before), mean) == "better"
    assert verdict(paired_test(before, after), -mean) == "worse"


def test_interval_over_tasks_is_students():
    assert interval_over_tasks([0.4]) is None
    assert interval_over_tasks([0.3, 0.3]) == pytest.approx((0.3, 0.3))
    # Student's own data (1908): extra hours of sleep by one drug; mean 0.75, t(9) = 2.262, s = 1.789
    hours = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    assert interval_over_tasks(hours) == pytest.approx((0.75 - 1.28, 0.75 + 1.28), abs=0.005)


def test_what_is_written_has_five_decimals_and_three_digits_of_p():
    thirds = [1.0, 0.0, 0.0]
    assert mean_of(thirds)["mean"] == 0.33333
    assert mean_of(thirds)["interval_95"] == pytest.approx(wilson(1, 3), abs=1e-5)
    assert mean_over_tasks([0.4]) == {"mean": 0.4, "interval_95": None}
    assert mean_over_tasks([1 / 3, 1 / 3]) == {"mean": 0.33333, "interval_95": [0.33333, 0.33333]}
    after, before = scores(8, 2, same=10)
    written = difference(after, before)
    assert (written["mean"], written["p"], written["verdict"]) == (0.3, 0.109, Verdict.NO_DIFFERENCE)
    assert written["interval_95"] == [round(bound, 5) for bound in paired_difference(after, before)[1:]]
