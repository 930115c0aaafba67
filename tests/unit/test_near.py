"""Rows near the decision: which are taken, and which choices a file is said to keep."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sg_local.proof.near import LEAST_ROWS, N_ROWS, kept_choices, rows_near_decision
from sg_local.selfguide.rows import DropReason, PairRow, Source


def pair(number: int, drop: DropReason | None, output: str | None = "refund") -> PairRow:
    return {
        "id": number,
        "input": f"message {number}",
        "output": output,
        "confidence": 0.1,
        "targets": None,
        "copies": 0,
        "drop": drop,
        "source": Source.MADE,
    }


def test_rows_that_were_dropped_as_unsure_are_taken_some_by_the_seed() -> None:
    unsure = [pair(number, DropReason.LOW_CONFIDENCE) for number in range(2 * N_ROWS)]
    others = [pair(1000, None), pair(1001, DropReason.NOISE), pair(1002, DropReason.LOW_SHARE, None)]
    taken = rows_near_decision([*others, *unsure], 0)
    assert len(taken) == len(set(taken)) == N_ROWS
    assert {output for _, output in taken} == {"refund"}
    assert not {text for text, _ in taken} & {row["input"] for row in others}
    assert taken == rows_near_decision([*unsure, *others], 0)
    assert taken != rows_near_decision(unsure, 1)


def test_of_too_few_rows_none_is_taken() -> None:
    rows = [pair(number, DropReason.DISAGREEMENT) for number in range(LEAST_ROWS)]
    assert len(rows_near_decision(rows, 0)) == LEAST_ROWS
    assert rows_near_decision(rows[1:], 0) == []


def chooses(*tokens: int) -> Any:
    """Logits that choose these tokens one after the other."""
    return np.eye(10, dtype=np.float32)[list(tokens)]


# A prompt of two tokens and the answer 3, 4, 5; after it nothing is asked.
ROW = ((1, 2, 3, 4, 5), 1)


@pytest.mark.parametrize(
    ("trained", "served", "rows", "tokens"),
    [
        ((3, 4, 5, 9), (3, 4, 5, 8), (1, 1), (3, 3)),  # after the answer's end
        ((3, 4, 5, 9), (3, 4, 6, 9), (1, 0), (3, 2)),
        # The trained model leaves the answer for token 6: so does the file, and what follows does not count.
        ((3, 6, 5, 9), (3, 6, 7, 9), (1, 1), (2, 2)),
        ((3, 6, 5, 9), (3, 4, 5, 9), (1, 0), (2, 1)),
        ((6, 4, 5, 9), (6, 9, 9, 9), (1, 1), (1, 1)),
    ],
)
def test_the_answer_that_the_trained_model_gives_is_what_counts(
    trained: Sequence[int], served: Sequence[int], rows: tuple[int, int], tokens: tuple[int, int]
) -> None:
    for by_row, expected in ((True, rows), (False, tokens)):
        kept = kept_choices([ROW], [chooses(*trained)], [chooses(*served)], by_row=by_row)
        assert (kept.n_choices, kept.n_equal) == expected
        assert (kept.mean_kl_nats > 0.01) == (expected[0] != expected[1])


def test_the_share_that_is_kept_is_told_from_the_noise_on_all_rows() -> None:
    """Leads of 0 to 4 nats, noise of 0.5: that many choices change in the long run, whatever some 50 rows show."""
    random = np.random.default_rng(0)
    counted, expected = [], []
    for _ in range(200):
        leads, shifts = random.uniform(0, 4, 48), random.normal(0, 0.5, 48)
        # A label of one token, and then the end of the turn, of which every file is sure.
        trained = [np.array([[lead, 0, -9], [-20, -20, 9], [0, 0, 0]], np.float32) for lead in leads]
        noise = [np.array([[shift, 0, 0]] * 3, np.float32) for shift in shifts]
        served = [rows + more for rows, more in zip(trained, noise, strict=True)]
        kept = kept_choices([((7, 0, 2), 0)] * 48, trained, served, by_row=True)
        counted.append(kept.n_equal / kept.n_choices)
        expected.append(kept.expected_share)
    in_the_long_run = 1 - 0.5 * 0.3989 / 4
    assert np.mean(counted) == pytest.approx(in_the_long_run, abs=0.01)
    assert np.mean(expected) == pytest.approx(in_the_long_run, abs=0.01)
    assert np.std(expected) < 0.7 * np.std(counted)  # which rows are there stays chance
    same = kept_choices([((7, 0, 2), 0)] * 48, trained, trained, by_row=True)
    assert (same.expected_share, same.n_equal) == (1.0, 48)
