"""Votes, calibration and balancing."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.selfguide.selection import (
    balancing_copies,
    calibrate,
    consensus,
    ensemble,
    follows_labels,
    in_turns,
    label_probabilities,
    likeness,
    margin,
    most_confident,
    most_informed,
    n_as_asked,
    reliability,
    sharpened,
    tempered,
    vote,
    vote_margin,
    with_evidence,
)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["at noon", "at noon", "12"], ("at noon", 2 / 3)),
        (["12", " 12 ", "at noon"], ("12", 2 / 3)),  # white space around an answer is none of it
        (["at noon", "12"], ("12", 1 / 2)),  # among equals the shortest
        (["bb", "aa", "aa", "bb"], ("bb", 1 / 2)),  # among equals of one length the first
        (["long answer", "long answer", "b", "c"], ("long answer", 1 / 2)),  # but the commonest before all
        (["one"], ("one", 1.0)),
    ],
)
def test_vote(samples: list[str], expected: tuple[str, float]):
    assert vote(samples) == expected


@pytest.mark.parametrize(
    ("samples", "margin_of_votes"),
    [(["a", "a", "b", "c"], 1 / 4), (["a", " a"], 1.0), (["a", "b"], 0.0), (["a"], 1.0)],
)
def test_vote_margin(samples: list[str], margin_of_votes: float):
    assert vote_margin(samples) == margin_of_votes


def test_consensus_is_the_answer_most_like_the_others():
    # No two are equal, so a vote is chance; three of them are about a café, and one says the most of what they say.
    samples = ["Aromi is a cheap café.", "Aromi is a café.", "I like food.", "Aromi, a cheap café."]
    best, agreement = consensus(samples)
    assert best == "Aromi is a cheap café."
    assert agreement == pytest.approx((8 / 9 + 8 / 9 + 0) / 3)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["at noon", "at noon", "12"], ("at noon", 1 / 2)),
        (["one"], ("one", 1.0)),
        (["four words are here", "x"], ("x", 0.0)),  # nothing in common: the shortest
        ([" a", "a ", "a"], ("a", 1.0)),
    ],
)
def test_consensus_of_few(samples: list[str], expected: tuple[str, float]):
    assert consensus(samples) == expected


def test_likeness_is_the_mean_rouge_l_with_the_others():
    assert likeness("a b", ["a b", "a b", "a c", ""]) == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert likeness("a", ["a"]) == 1.0


def test_the_answer_that_the_input_makes_likelier_most_is_chosen():
    # "no." is the likeliest with the input, and as likely without it
    best, information = most_informed([-2.0, -6.0, -12.0], [-2.2, -20.0, -24.0], [1, 2, 4])
    assert (best, information) == (1, 7.0)
    assert most_informed([-3.0], [-1.0], [2]) == (0, -1.0)


def test_an_ensemble_is_the_mean_of_the_log_odds():
    assert ensemble([[0.9, 0.1], [0.5, 0.5]]) == pytest.approx([0.75, 0.25])  # odds 9 and 1 make 3
    assert ensemble([[0.2, 0.8]]) == pytest.approx([0.2, 0.8])
    assert ensemble([[1.0, 0.0], [0.5, 0.5]])[1] < 1e-9


def test_a_low_temperature_takes_doubt_away_and_keeps_the_order():
    assert sharpened([0.75, 0.25], 0.5) == pytest.approx([0.9, 0.1])  # odds 3 squared
    assert sharpened([0.75, 0.25], 1.0) == pytest.approx([0.75, 0.25])
    assert sharpened([0.5, 0.5], 0.05) == [0.5, 0.5]


def test_label_probabilities_are_of_the_labels_alone():
    # log 0.3 and log 0.1: of all text 60 % is no label at all
    assert label_probabilities([-1.20397, -2.30259]) == pytest.approx([0.75, 0.25], abs=1e-5)
    assert label_probabilities([-1000.0, -1000.0]) == [0.5, 0.5]
    assert label_probabilities([-1.0, -2000.0]) == [1.0, 0.0]


def right_share(rows: list[list[float]], truth: list[int]) -> float:
    return sum(row.index(max(row)) == label for row, label in zip(rows, truth, strict=True)) / len(rows)


def test_calibrate_removes_a_planted_bias():
    rng = random.Random(0)
    truth = [index % 3 for index in range(300)]
    bias = [4.0, 0.0, -3.0]  # nats: without calibration nearly all is label 0
    rows = [
        [bias[label] + (2.0 if label == own else 0.0) + rng.gauss(0, 0.5) for label in range(3)]
        for own in truth
    ]
    assert right_share([label_probabilities(row) for row in rows], truth) < 0.5
    calibrated = calibrate(rows)
    # Wrong only where noise of deviation 0.71 passes 2 nats: 2 * P(z > 2.83) = 0.5 % of the rows.
    assert right_share(calibrated, truth) > 0.97
    assert all(sum(row) == pytest.approx(1) for row in calibrated)
    unbiased = calibrate([[value - bias[label] for label, value in enumerate(row)] for row in rows])
    for with_bias, without in zip(calibrated, unbiased, strict=True):
        assert with_bias == pytest.approx(without)


def test_calibrate_by_hand():
    # Mean log-odds of label 0: (2.3 + 1.5) / 2 = 1.9, so 0.4 and -0.4 are left: 1 / (1 + exp(-0.4)) = 0.5987
    first, second = calibrate([[-0.1, -2.4], [-0.2, -1.7]])
    assert first == pytest.approx([0.5987, 0.4013], abs=1e-4)
    assert second == pytest.approx([0.4013, 0.5987], abs=1e-4)


def test_one_impossible_score_does_not_decide_the_batch():
    rows = [[-1.0, -1.5]] * 9 + [[0.0, -100_000.0]]
    calibrated = calibrate(rows)
    assert calibrated[0][0] < 0.5  # label 1 gains from the mean, but by 69 nats in ten rows at most
    assert calibrated[0][0] == pytest.approx(
        1 / (1 + 2.718281828 ** (-(0.5 - (9 * 0.5 + 69.08) / 10))), abs=1e-3
    )


def test_calibrate_keeps_no_rows_and_single_rows():
    assert calibrate([]) == []
    assert calibrate([[-0.1, -9.0]]) == [pytest.approx([0.5, 0.5])]


def test_margin():
    assert margin([0.2, 0.7, 0.1]) == pytest.approx(0.5)
    assert margin([0.5, 0.5]) == 0


def test_most_confident_is_chosen_for_each_label():
    labels = ["a", "a", "a", "a", "b", "b", "c"]
    margins = [0.1, 0.9, 0.5, 0.9, 0.01, 0.02, 0.0]
    assert most_confident(labels, margins, 0.5) == [False, True, False, True, False, True, True]
    assert most_confident(labels, margins, 1.0) == [True] * 7
    # One of each label stays, however small the share; of equals the first.
    assert most_confident(labels, margins, 0.05) == [False, True, False, False, False, True, True]
    assert most_confident([], [], 0.5) == []


@pytest.mark.parametrize(
    ("agreed", "n_rows", "n_labels", "follows"),
    [
        (200, 400, 2, False),  # chance
        (250, 400, 2, False),  # over chance, but a disagreement is as likely the judge's fault
        (320, 400, 2, True),  # 0.80, interval from 0.76: half way from 0.5 to 1 is 0.75
        (304, 400, 2, False),  # 0.76, interval from 0.72
        (100, 400, 4, False),  # chance
        (280, 400, 4, True),  # 0.70, interval from 0.65: half way from 0.25 to 1 is 0.625
        (4, 4, 2, False),  # too few to tell: interval from 0.51
        (400, 400, 2, True),
        (0, 400, 2, False),
        (0, 0, 2, False),
    ],
)
def test_follows_labels(agreed: int, n_rows: int, n_labels: int, follows: bool):
    assert follows_labels(agreed, n_rows, n_labels) is follows


def shown(labels: list[str], copies: list[int]) -> Counter[str]:
    return Counter(label for label, count in zip(labels, copies, strict=True) for _ in range(count))


def test_balancing_repeats_the_rarer_labels_rows():
    labels = ["a", "a", "b", "a", "b", "a", "a"]
    copies = balancing_copies(labels, 8)
    assert shown(labels, copies) == {"a": 5, "b": 5}
    assert copies == [1, 1, 3, 1, 2, 1, 1]  # the more confident of b's rows once more


def test_no_row_is_repeated_more_than_max_copies():
    labels = ["a"] * 10 + ["b"]
    copies = balancing_copies(labels, 3)
    assert shown(labels, copies) == {"a": 3, "b": 3}
    assert copies == [1, 1, 1] + [0] * 7 + [3]  # the least confident give way


def test_max_copies_of_one_drops_instead_of_repeating():
    assert balancing_copies(["a", "a", "a", "b"], 1) == [1, 0, 0, 1]


def test_a_label_that_never_occurs_does_not_empty_the_others():
    # Labels a, b and c, of which c was never annotated.
    assert balancing_copies(["a", "b", "a", "b"], 8) == [1, 1, 1, 1]
    assert balancing_copies(["a", "a", "a"], 8) == [1, 1, 1]
    assert balancing_copies([], 8) == []


def test_equal_labels_are_not_all_dropped():
    # In the reference the reason "random chosen" compares labels instead of rows, so it is always true.
    assert balancing_copies(["a"] * 5, 1) == [1] * 5


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 9))
def test_balancing_makes_all_counts_equal_within_max_copies(labels: list[str], max_copies: int):
    copies = balancing_copies(labels, max_copies)
    counts = shown(labels, copies)
    assert set(counts) == set(labels)
    assert len(set(counts.values())) == 1
    assert max(copies) <= max_copies
    for label in set(labels):  # an earlier row is shown no less than a later one
        own = [count for other, count in zip(labels, copies, strict=True) if other == label]
        assert own == sorted(own, reverse=True)
        assert max(own) - min(own) <= 1


@pytest.mark.parametrize(("true_reliability", "n_labels"), [(0.9, 2), (0.7, 4), (0.55, 3)])
def test_reliability_is_found_from_the_agreement_of_two_equals(true_reliability: float, n_labels: int):
    agreement = true_reliability**2 + (1 - true_reliability) ** 2 / (n_labels - 1)
    assert reliability(round(agreement * 10**6), 10**6, n_labels) == pytest.approx(true_reliability, abs=3e-3)


def test_reliability_stays_between_chance_and_its_bound():
    assert reliability(10, 100, 4) == 0.25
    assert reliability(32, 100, 4) == 0.25  # a little over chance in a hundred rows is luck
    assert reliability(100, 100, 2) == 0.95
    assert reliability(0, 0, 2) == 0.5


def test_tempered_rows_are_as_sure_as_asked_and_keep_their_order():
    flat = [[0.36, 0.33, 0.31], [0.30, 0.30, 0.40], [0.34, 0.33, 0.33]]
    rows = tempered(flat, 0.8)
    assert sum(map(max, rows)) / 3 == pytest.approx(0.8, abs=1e-3)
    assert [row.index(max(row)) for row in rows] == [0, 2, 0]
    assert max(rows[1]) > max(rows[0]) > max(rows[2])
    assert all(sum(row) == pytest.approx(1) for row in rows)


def test_evidence_is_bayes():
    # 0.6 * 0.2 against 0.4 * 0.8
    assert with_evidence([0.6, 0.4], 1, 0.8) == pytest.approx([0.12 / 0.44, 0.32 / 0.44])
    assert with_evidence([0.5, 0.3, 0.2], 2, 1 / 3) == pytest.approx([0.5, 0.3, 0.2])  # chance says nothing


def test_labels_come_in_turn_as_long_as_they_last() -> None:
    assert in_turns(["a", "a", "b", "a", "c", "b"]) == [0, 2, 4, 1, 5, 3]
    assert in_turns(["", "", ""]) == [0, 1, 2]
    assert in_turns([]) == []


def test_rows_as_asked_are_counted_without_the_bias_that_all_share():
    # Label 0 is likelier in every row; less so in the last two, which are of label 1 then.
    rows = [[-0.1, -6.0], [-0.1, -6.2], [-0.4, -2.0], [-0.4, -2.1]]
    assert n_as_asked(rows, [0, 0, 1, 1]) == 4
    assert n_as_asked(rows, [0, 1, 1, 0]) == 2
    assert n_as_asked([], []) == 0
