"""Rows near the decision: where a file that lost a little of what was trained answers otherwise first.

    {"id": 31, "input": "Can I have it back?", "output": "refund", "confidence": 0.04, "drop": "low_confidence"}
    Kept(n_choices=48, n_equal=46, mean_kl_nats=0.021)

`curate` drops rows that the student is unsure of. The rows that it keeps lie far from a tie, where every file chooses
alike: measured on `support-inbox`, model.gguf in Q4_1 chooses as the trained model at 98 % of the positions of kept
rows, on 37 of 40 dropped rows, and on 55 of 60 test rows.

What counts is the answer. With labels, a row is one choice: the same up to the token at which the trained model leaves
the compared answer, since what comes after that is of an answer that it would not give. In a free answer each token is
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sg_local.files import row_seed
from sg_local.llama.logits import Logits, log_softmax
from sg_local.llama.sequences import From
from sg_local.selfguide.rows import DropReason, PairRow

N_ROWS = 48
LEAST_ROWS = 16  # of fewer, a share says little
N_TOKENS = 8  # of an answer: the logits of long ones would fill the memory
LEAST_KEPT_SHARE = 0.97  # of the trained model's choices, that a file has to make

_UNSURE = (DropReason.LOW_CONFIDENCE, DropReason.DISAGREEMENT, DropReason.LOW_SHARE)


@dataclass(frozen=True)
class Kept:
    """How many of the trained model's choices a file makes too, and how far it is from the trained model there."""

    n_choices: int
    n_equal: int
    mean_kl_nats: float

    @property
    def share(self) -> float:
        """Of the trained model's choices."""
        return self.n_equal / self.n_choices


def rows_near_decision(pairs: Sequence[PairRow], seed: int) -> list[tuple[str, str]]:
    """Inputs and outputs of up to N_ROWS rows that were dropped as unsure, chosen by the seed; none of too few."""
    unsure = [pair for pair in pairs if pair["drop"] in _UNSURE and pair["output"]]
    if len(unsure) < LEAST_ROWS:
        return []
    unsure.sort(key=lambda pair: row_seed(seed, "near_decision", pair["id"]))
    return [(pair["input"], str(pair["output"])) for pair in unsure[:N_ROWS]]


def kept_choices(
    sequences: Sequence[From], trained: Sequence[Logits], served: Sequence[Logits], *, by_row: bool
) -> Kept:
    """Compares what is chosen in each sequence, from its first compared position on. by_row: see above."""
    import numpy as np

    n_choices, n_equal, kl_nats = 0, 0, []
    for (tokens, first), reference, other in zip(sequences, trained, served, strict=True):
        chosen = reference.argmax(axis=-1)
        answer = np.array(tokens[first + 1 :])
        leaves = np.flatnonzero(chosen[: len(answer)] != answer[: len(chosen)])
        end = leaves[0] + 1 if len(leaves) else len(answer)  # nothing is asked after the answer's end
        equal = chosen[:end] == other.argmax(axis=-1)[:end]
        n_choices += 1 if by_row else len(equal)
        n_equal += int(equal.all()) if by_row else int(equal.sum())
        log_p, log_q = log_softmax(reference[:end]), log_softmax(other[:end])
        kl_nats.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return Kept(n_choices, n_equal, float(np.concatenate(kl_nats).mean()))
