"""What made inputs, and the labels that they were made for, teach of real ones: how far to trust which score."""

import random

import pytest

from sg_local.selfguide.fitted import MAX_LABELS, fitted_scores
from sg_local.selfguide.labels import NOTHING_KNOWN, Known, LabelScores, label_scores

LABELS = "abc"

Row = list[dict[str, float]]


def rows_of(labels: list[str], seed: int) -> list[Row]:
    """As outputs.jsonl has them: the first prompt says a little of the label, the second says much of nothing."""
    rng = random.Random(seed)
    return [
        [
            {name: rng.gauss(-1 if name == label else -2, 0.25) for name in LABELS},
            {name: rng.gauss(-6, 3) for name in LABELS},
        ]
        for label in labels
    ]


def accuracy(made: list[str], made_for: list[str], known: Known = NOTHING_KNOWN) -> float:
    """Share of 90 real rows that get their label, beside rows that were made for labels."""
    truth = list(LABELS) * 30
    scores = scores_of([*rows_of(made, 1), *rows_of(truth, 2)], [*made_for, *[None] * 90], known)
    found = [LABELS[row.index(max(row))] for row in scores.last[len(made) :]]
    return sum(one == other for one, other in zip(found, truth, strict=True)) / 90


def scores_of(rows: list[Row], made_for: list[str | None], known: Known) -> LabelScores:
    is_real = [label is None for label in made_for]
    return label_scores(
        rows, made_for, LABELS, removes_bias=True, weighs_evidence=True, known=known._replace(is_real=is_real)
    )


def with_faults(labels: list[str], share: float) -> list[str]:
    """The labels, of which a share is another one by chance."""
    rng = random.Random(3)
    return [rng.choice(LABELS) if rng.random() < share else label for label in labels]


def test_real_rows_are_told_apart_by_what_tells_made_rows_apart() -> None:
    made = list(LABELS) * 30
    assert accuracy([], []) < 0.6
    assert accuracy(made, made) > 0.9
    assert accuracy(made, with_faults(made, 0.4)) > 0.8  # a made-for label is often wrong


def test_shares_and_labelled_rows_count_as_they_do_without() -> None:
    made = list(LABELS) * 30
    gold = [(row, label) for row, label in zip(rows_of(made[:30], 4), made[:30], strict=True)]
    assert accuracy(made, made, Known(shares=(1 / 3, 1 / 3, 1 / 3), gold=gold)) > 0.9
    assert accuracy(made, made, Known(shares=(0.9, 0.05, 0.05))) < 0.5  # nearly all rows are a then


@pytest.mark.parametrize(
    "made_for", [["b", "c", "a"] * 4, list(LABELS) * 3, []], ids=["chance", "few", "none"]
)
def test_what_rows_were_made_for_counts_nothing_where_it_could_be_chance(made_for: list[str]) -> None:
    made = list(LABELS) * (len(made_for) // 3)
    scrambled = random.Random(5).sample(made_for * 5, len(made_for) * 5) if len(made_for) > 9 else made_for
    rows = [*rows_of(made * (len(scrambled) // max(1, len(made))), 1), *rows_of(list(LABELS) * 30, 2)]
    with_them = scores_of(rows, [*scrambled, *[None] * 90], Known())
    without = scores_of(rows, [None] * len(rows), Known())
    real_alone = scores_of(rows[len(scrambled) :], [None] * 90, Known())
    assert without.calibrated is not None
    assert with_them.calibrated is not None
    found = [row.index(max(row)) for row in with_them.calibrated[len(scrambled) :]]
    assert real_alone.calibrated is not None
    expected = [row.index(max(row)) for row in real_alone.calibrated]
    assert (
        sum(one == other for one, other in zip(found, expected, strict=True)) >= 85
    )  # drawn to the made batch


def test_many_labels_and_few_rows_of_a_label_have_no_map() -> None:
    made = [[[-1.0, -2.0]]] * 30
    assert fitted_scores(made, [0] * 21 + [1] * 9, made) is None
    assert fitted_scores(made, [0, 1] * 15, made) is not None
    n_labels = MAX_LABELS + 1
    wide = [[[-float(label) for label in range(n_labels)]]] * (10 * n_labels)
    assert fitted_scores(wide, list(range(n_labels)) * 10, wide) is None
