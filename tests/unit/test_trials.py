"""Which way of asking is chosen, from what a few trial inputs were worth."""

import pytest

from sg_local.selfguide.rows import Trial
from sg_local.selfguide.trials import best_style, yield_of_good


def trial(style: str, made: int, good: int, agreement: float | None) -> Trial:
    return {"style": style, "made": made, "good": good, "agreement": agreement, "form_filter": True}


def test_without_labels_the_way_with_most_good_inputs_is_chosen():
    trials = [trial("meta", 32, 9, None), trial("turns", 32, 20, None), trial("list", 32, 30, None)]
    assert best_style(trials, 0) == "list"


def test_a_way_that_keeps_to_the_label_is_worth_more_than_one_with_more_inputs():
    turns, listed = trial("turns", 32, 27, 0.78), trial("list", 32, 31, 0.3)
    assert best_style([listed, turns], 4) == "turns"
    # 21 of 27 are as asked, so 59 % at least (Wilson); a² + (1 - a)² / 3 = 0.59 has a = 0.75
    assert yield_of_good(turns, 4) == pytest.approx(27 / 32 * 0.75, abs=0.01)


def test_of_ways_that_are_about_as_good_the_first_is_taken():
    turns, listed = trial("turns", 32, 25, 0.6), trial("list", 32, 28, 0.57)
    assert yield_of_good(turns, 2) < yield_of_good(listed, 2)
    assert best_style([trial("meta", 32, 12, 0.67), turns, listed], 2) == "turns"


def test_agreement_below_chance_counts_as_chance_and_equals_go_by_the_order():
    assert yield_of_good(trial("list", 10, 10, 0.1), 2) == 0.5
    trials = [trial("meta", 32, 20, 0.5), trial("turns", 32, 20, 0.4)]
    assert best_style(trials, 2) == "meta"


def test_a_way_without_a_good_input_is_worth_nothing():
    assert best_style([trial("meta", 32, 0, None), trial("list", 32, 1, 0.0)], 2) == "list"
