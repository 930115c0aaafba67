"""Calibration error, temperature, and what is right among the sure rows: numbers worked out by hand."""

import math

import pytest

from sg_local.selfguide.calibration import (
    LEAST_TEMPERATURE,
    at_temperature,
    calibration_error,
    calibration_of,
    fitted_temperature,
    probability_of,
    risk_coverage,
)

SURE = {"a": math.log(0.9), "b": math.log(0.1)}


def test_the_error_is_the_mean_distance_of_each_bin_between_sure_and_right() -> None:
    assert calibration_error([0.95] * 4, [True, True, True, False]) == pytest.approx(0.2)
    # Two bins that err in opposite directions do not make up for each other.
    assert calibration_error([0.95, 0.55], [False, True]) == pytest.approx((0.95 + 0.45) / 2)
    assert calibration_error([1.0, 0.0], [True, False]) == 0


def test_a_temperature_makes_probabilities_as_sure_as_they_are_right() -> None:
    """Sure by 9 to 1 and right in 3 of 4: at the temperature where 9 to 1 becomes 3 to 1."""
    temperature = fitted_temperature([SURE] * 4, ["a", "a", "a", "b"])
    assert temperature == pytest.approx(math.log(9) / math.log(3), rel=1e-4)
    assert at_temperature(SURE, temperature) == pytest.approx({"a": 0.75, "b": 0.25}, abs=1e-3)
    assert at_temperature(SURE, 1) == pytest.approx({"a": 0.9, "b": 0.1})


def test_a_few_right_rows_do_not_make_a_model_certain() -> None:
    assert fitted_temperature([SURE] * 4, ["a"] * 4) == pytest.approx(LEAST_TEMPERATURE, rel=1e-3)
    assert fitted_temperature([SURE], ["no label"]) == 1


def test_the_surest_rows_come_first() -> None:
    covered = risk_coverage([0.5, 0.9, 0.8, 0.7], [False, True, True, False])
    by_share = {item["share"]: (item["right"], item["least_probability"]) for item in covered}
    assert (by_share[1.0], by_share[0.5]) == ((0.5, 0.5), (1.0, 0.8))


def test_an_answer_that_is_no_label_has_no_probability() -> None:
    assert probability_of("B.", {"a": 0.9, "b": 0.1}) == 0.1
    assert probability_of("c", {"a": 0.9, "b": 0.1}) == 0
    told = calibration_of(["c"], ["a"], [SURE])
    assert (told["calibration_error"], told["risk_coverage"][0]["right"]) == (0, 0)


def test_each_half_has_the_temperature_of_the_other() -> None:
    """All wrong rows are in one half: its temperature is of the half that is always right, and makes it worse."""
    told = calibration_of(["a"] * 4, ["a", "b", "a", "b"], [SURE] * 4)
    assert told["calibration_error"] == pytest.approx(0.4)
    assert told["calibration_error_at_temperature"] > 0.3
