"""From rows of token ids to a batch: padded rows, or one prompt tree in which nothing occurs twice.

    rows (prompt | answer)     1 5 6 | 7 2      1 5 8 | 9 2
    tree, one sequence         1 5 6 7 2 8 9 2
    its positions              0 1 2 3 4 2 3 4      they go back where a row parts from the others
    read at                    6 -> 7, 7 -> 2, 8 -> 9, 9 -> 2

The rows of a task share their instruction and examples, and equal rows share everything. What is shared is computed
once. A token sees only the tokens before it in the same row, so activations, loss and gradients are those of the padded
batch. Logits are read only where a token of an answer is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TrainRow:
    """Token ids of one row: the prompt, with BOS if the model wants one, and the answer with its end token.

    A soft target has several answers, each weighted with its probability. The loss is then the cross-entropy with
    that distribution.
    """

    prompt: Ids
    answer: Ids
    weight: float = 1.0  # of each of the answer's tokens in the loss
    other_answers: tuple[tuple[Ids, float], ...] = ()  # with their weights

    @property
    def answers(self) -> tuple[tuple[Ids, float], ...]:
        """All answers with their weights."""
        return ((self.answer, self.weight), *self.other_answers)

    @property
    def n_tokens(self) -> int:
        """The number of tokens of the prompt and the longest answer."""
        return len(self.prompt) + max(len(answer) for answer, _ in self.answers)

    @property
    def sequences(self) -> list[tuple[Ids, Ids, float]]:
        """(prompt, answer, weight) for each answer."""
        return [(self.prompt, answer, weight) for answer, weight in self.answers]


class Batch(NamedTuple):
    """Sequences of tokens, and where the loss reads them; loss = sum(weight * nll) / sum(weight)."""

    input_ids: Ints  # (n_sequences, n_tokens)
    position_ids: Ints  # (n_sequences, n_tokens)
    visible: Bools | None  # (n_tokens, n_tokens), [i, j]: token i sees token j; None: all before it
    sources: Ints  # (n_targets,) places in the flattened input_ids, one for each token to predict
    targets: Ints  # (n_targets,) the tokens to predict
    weights: npt.NDArray[np.float32]  # (n_targets,)


def padded_batch(rows: Sequence[TrainRow]) -> Batch:
    """One sequence for each answer, after its prompt, padded at the end with tokens that no other token sees."""
    longest = max(row.n_tokens for row in rows)
    sequences = [sequence for row in rows for sequence in row.sequences]
    input_ids = np.zeros((len(sequences), longest), np.int64)
    reads: dict[tuple[int, int], float] = {}
    for index, (prompt, answer, weight) in enumerate(sequences):
        input_ids[index, : len(prompt) + len(answer)] = (*prompt, *answer)
        for place, token in enumerate(answer, index * longest + len(prompt) - 1):
            reads[place, token] = weight
    position_ids = np.broadcast_to(np.arange(longest), input_ids.shape).copy()
    return Batch(input_ids, position_ids, None, *_columns(reads))


def tree_batch(rows: Sequence[TrainRow]) -> Batch:
    """All rows in one sequence, as a prompt tree: what several rows begin with stands there once."""
    nodes: dict[tuple[int, int], int] = {}  # (the token before, token id) -> place in the sequence
    reads: dict[tuple[int, int], float] = {}
    sequences = [sequence for row in rows for sequence in row.sequences]
    for prompt, answer, weight in sequences:
        place = -1
        for index, token in enumerate((*prompt, *answer)):
            if index >= len(prompt):
                reads[place, token] = reads.get((place, token), 0.0) + weight
            place = nodes.setdefault((place, token), len(nodes))
    visible = np.eye(len(nodes), dtype=np.bool_)
    position_ids = np.zeros((1, len(nodes)), np.int64)
    for (before, _), place in nodes.items():  # the token before it has an earlier place
        if before >= 0:
            visible[place] |= visible[before]
            position_ids[0, place] = position_ids[0, before] + 1
    input_ids = np.array([[token for _, token in nodes]], np.int64)
    return Batch(input_ids, position_ids, visible, *_columns(reads))


def within_window(batch: Batch, window: int) -> Bools:
    """What each token of a tree sees in a layer with sliding attention: the last `window` tokens, with itself."""
    assert batch.visible is not None
    positions = batch.position_ids[0]
    near: Bools = batch.visible & (positions[:, None] - positions[None, :] < window)
    return near


def _columns(reads: dict[tuple[int, int], float]) -> tuple[Ints, Ints, Any]:
    """(place, token) -> weight, as sources, targets and weights."""
    pairs = np.array(list(reads), np.int64)
    return pairs[:, 0], pairs[:, 1], np.array(list(reads.values()), np.float32)
