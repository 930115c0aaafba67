"""Batches for training: whatever their shape, the same tokens are predicted from the same contexts."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sg_local.finetune.batches import Batch, TrainRow, padded_batch, tree_batch, within_window

TOKENS = st.integers(0, 3)  # few, so that rows share beginnings
ROWS = st.lists(
    st.builds(
        TrainRow,
        prompt=st.lists(TOKENS, min_size=1, max_size=6).map(tuple),
        answer=st.lists(TOKENS, min_size=1, max_size=4).map(tuple),
        weight=st.sampled_from([0.5, 1.0, 2.0]),
        other_answers=st.lists(
            st.tuples(st.lists(TOKENS, min_size=1, max_size=4).map(tuple), st.sampled_from([0.25, 0.5, 1.0])),
            max_size=2,
        ).map(tuple),
    ),
    min_size=1,
    max_size=8,
)


def predictions(batch: Batch) -> Counter[tuple[tuple[int, ...], int]]:
    """(what the predicting token sees, token to predict) -> sum of the weights."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    n_tokens = batch.input_ids.shape[1]
    for source, target, weight in zip(batch.sources, batch.targets, batch.weights, strict=True):
        sequence, place = divmod(int(source), n_tokens)
        seen = np.arange(n_tokens) <= place if batch.visible is None else batch.visible[place]
        positions = batch.position_ids[sequence][seen]
        assert list(positions) == list(range(len(positions)))
        found[tuple(batch.input_ids[sequence][seen].tolist()), int(target)] += float(weight)
    return found


def expected(rows: list[TrainRow]) -> Counter[tuple[tuple[int, ...], int]]:
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for row in rows:
        for answer, weight in row.answers:
            for index, token in enumerate(answer):
                found[(*row.prompt, *answer[:index]), token] += weight
    return found


@given(ROWS)
def test_padded_and_tree_predict_the_same_from_the_same(rows: list[TrainRow]) -> None:
    assert predictions(padded_batch(rows)) == expected(rows)
    assert predictions(tree_batch(rows)) == expected(rows)


@given(ROWS)
def test_a_tree_holds_every_beginning_once(rows: list[TrainRow]) -> None:
    beginnings = {
        ((*row.prompt, *answer))[:length]
        for row in rows
        for answer, _ in row.answers
        for length in range(1, len(row.prompt) + len(answer) + 1)
    }
    assert tree_batch(rows).input_ids.shape == (1, len(beginnings))


@given(ROWS, st.integers(1, 8))
def test_a_window_cuts_what_is_far(rows: list[TrainRow], window: int) -> None:
    batch = tree_batch(rows)
    assert batch.visible is not None
    near = within_window(batch, window)
    for place, position in enumerate(batch.position_ids[0]):
        seen = batch.position_ids[0][near[place]]
        assert sorted(seen) == list(range(max(0, position - window + 1), position + 1))


def test_shared_instruction_and_equal_rows_cost_nothing() -> None:
    row = TrainRow((1, 5, 6), (7, 2))
    other = TrainRow((1, 5, 8), (9, 2), weight=0.5)
    batch = tree_batch([row, other, row])
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 2, 8, 9, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert batch.sources.tolist() == [2, 3, 5, 6]
    assert batch.targets.tolist() == [7, 2, 9, 2]
    assert batch.weights.tolist() == [2.0, 2.0, 0.5, 0.5]


def test_a_soft_target_is_a_prompt_with_several_answers() -> None:
    soft = TrainRow((1, 5), (7, 2), 0.75, (((9, 2), 0.25),))
    batch = tree_batch([soft])
    assert batch.input_ids.tolist() == [[1, 5, 7, 2, 9, 2]]
    assert dict(zip(batch.targets.tolist(), batch.weights.tolist(), strict=True)) == {
        7: 0.75,
        2: 0.25,
        9: 0.25,
    }
    assert padded_batch([soft]).input_ids.tolist() == [[1, 5, 7, 2], [1, 5, 9, 2]]
