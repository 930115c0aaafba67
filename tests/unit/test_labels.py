"""Label scores: calibration, evidence, and how far they agree with the made-for labels."""

import random

import pytest

from sg_local.selfguide.labels import (
    Known,
    calibrate,
    ensemble,
    follows_labels,
    kappa,
    label_probabilities,
    label_scores,
    margin,
    reliability,
    sharpened,
    tempered,
    with_evidence,
)


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


BIASED = [[-0.1, -6.0], [-0.1, -6.2], [-0.4, -2.0], [-0.4, -2.1]]


def scored(rows: list[list[float]]) -> list[list[dict[str, float]]]:
    """As outputs.jsonl has them, by one prompt."""
    return [[{"a": first, "b": second}] for first, second in rows]


@pytest.mark.parametrize(("made_for", "agreed"), [("aabb", 4), ("abba", 2)])
def test_agreement_is_counted_without_the_bias_that_all_share(made_for: str, agreed: int):
    # Label a is likelier in every row; less so in the last two, which are of label b then.
    scores = label_scores(scored(BIASED), made_for, "ab", removes_bias=True, weighs_evidence=False)
    assert scores.agreed == agreed
    assert scores.last == scores.calibrated == [pytest.approx(row) for row in calibrate(BIASED)]
    biased = label_scores(scored(BIASED), "aaaa", "ab", removes_bias=False, weighs_evidence=False)
    assert (biased.agreed, biased.calibrated) == (4, None)
    assert biased.last == biased.raw
    assert label_scores([], "", "ab", removes_bias=True, weighs_evidence=False).agreed == 0


def test_what_several_prompts_say_is_averaged_after_each_lost_its_own_bias():
    prompts = [
        [{"a": -0.1, "b": -4.0}, {"a": -9.0, "b": -0.1}],
        [{"a": -0.2, "b": -3.6}, {"a": -3.0, "b": -0.2}],
    ]
    scores = label_scores(prompts, "ba", "ab", removes_bias=True, weighs_evidence=False)
    # Log-odds of a: 3.9 and 3.4, means 0.25 apart; -8.9 and -2.8, 3.05 apart: together -1.4 and 1.4.
    assert scores.raw[0] == pytest.approx(
        ensemble([label_probabilities([-0.1, -4]), label_probabilities([-9, -0.1])])
    )
    assert scores.calibrated == [
        pytest.approx([0.1978, 0.8022], abs=1e-4),
        pytest.approx([0.8022, 0.1978], abs=1e-4),
    ]
    assert scores.agreed == 2


def test_the_made_for_label_is_evidence_as_far_as_it_is_reliable():
    rows = [[-0.1, -6.0], [-6.0, -0.1]] * 19 + [[-0.6, -0.8], [-0.8, -0.6]]
    scores = label_scores(scored(rows), "ab" * 19 + "ba", "ab", removes_bias=True, weighs_evidence=True)
    assert scores.agreed == 38
    assert scores.reliability == reliability(38, 40, 2) > 0.9
    assert scores.with_evidence is not None
    assert scores.last == scores.with_evidence
    assert [row.index(max(row)) for row in scores.last[-2:]] == [1, 0]
    # By chance it says nothing.
    by_chance = label_scores(scored(rows), "aabb" * 10, "ab", removes_bias=True, weighs_evidence=True)
    assert (by_chance.with_evidence, by_chance.reliability) == (None, 0.5)


def test_a_row_without_a_made_for_label_is_scored_without_that_evidence() -> None:
    labels = ["a", "b"]
    sure = {label: [{label: -0.01, other: -5.0}] for label, other in (("a", "b"), ("b", "a"))}
    made_for = [*labels * 20, None]
    rows = [sure[label or "a"] for label in made_for]
    scores = label_scores(rows, made_for, labels, removes_bias=False, weighs_evidence=True)
    assert scores.with_evidence is not None
    assert scores.with_evidence[0][0] > scores.with_evidence[-1][0] > 0.5


def test_kappa_is_agreement_beyond_chance():
    assert kappa([0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert kappa([0, 1, 0, 1], [0, 0, 1, 1]) == 0
    assert kappa([0, 1, 0, 1], [1, 0, 1, 0]) == -1
    assert kappa([0] * 9 + [1], [0] * 10) == 0  # 9 of 10 are the same, as by chance
    assert kappa([0, 0], [0, 0]) == 0
    # Cohen (1960): 20 + 15 of 50 are the same, chance 0.5
    assert kappa([0] * 25 + [1] * 25, [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15) == pytest.approx(0.4)


def test_how_far_the_prompts_agree_is_told_of_real_rows_alone():
    sure, other = {"a": -0.1, "b": -3.0}, {"a": -3.0, "b": -0.1}
    agreeing, differing = [[sure, sure], [other, other]] * 10, [[sure, sure], [sure, other]] * 10
    real = [True] * 20 + [False] * 20

    def found(rows: list[list[dict[str, float]]], is_real: list[bool]) -> float | None:
        known = Known(is_real)
        scores = label_scores(
            rows, [None] * len(rows), "ab", removes_bias=True, weighs_evidence=False, known=known
        )
        return scores.real_kappa

    assert found([*agreeing, *differing], real) == 1
    assert found([*differing, *agreeing], real) == 0
    assert found([*differing, *agreeing], [False] * 40) is None
    assert found([row[:1] for row in differing] * 2, real) is None
    assert found([*agreeing, *differing], [True] * 19 + [False] * 21) is None
