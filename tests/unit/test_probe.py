"""Which way of asking is chosen, from what a few trial inputs were worth."""

import pytest

from sg_local.selfguide.probe import Trial, chosen


def test_without_labels_the_way_with_most_good_inputs_is_chosen():
    trials = [Trial("meta", 32, 9, None), Trial("turns", 32, 20, None), Trial("list", 32, 30, None)]
    assert chosen(trials, 0) == "list"


def test_a_way_that_keeps_to_the_label_is_worth_more_than_one_with_more_inputs():
    turns, listed = Trial("turns", 32, 27, 0.78), Trial("list", 32, 31, 0.3)
    assert chosen([listed, turns], 4) == "turns"
    # 21 of 27 are as asked, so 59 % at least (Wilson); a² + (1 - a)² / 3 = 0.59 has a = 0.75
    assert turns.yield_of_good(4) == pytest.approx(27 / 32 * 0.75, abs=0.01)


def test_of_ways_that_are_about_as_good_the_first_is_taken():
    turns, listed = Trial("turns", 32, 25, 0.6), Trial("list", 32, 28, 0.57)
    assert turns.yield_of_good(2) < listed.yield_of_good(2)
    assert chosen([Trial("meta", 32, 12, 0.67), turns, listed], 2) == "turns"


def test_agreement_below_chance_counts_as_chance_and_equals_go_by_the_order():
    assert Trial("list", 10, 10, 0.1).yield_of_good(2) == 0.5
    trials = [Trial("meta", 32, 20, 0.5), Trial("turns", 32, 20, 0.4)]
    assert chosen(trials, 2) == "meta"


def test_a_way_without_a_good_input_is_worth_nothing():
    assert chosen([Trial("meta", 32, 0, None), Trial("list", 32, 1, 0.0)], 2) == "list"
