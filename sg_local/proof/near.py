"""Rows near the decision: where a file that lost a little of what was trained answers otherwise first.

    {"id": 31, "input": "Can I have it back?", "output": "refund", "confidence": 0.04, "drop": "low_confidence"}
    Kept(n_choices=48, n_equal=46, expected_share=0.963, mean_kl_nats=0.021)

`curate` drops rows that the base is unsure of. The rows that it keeps lie far from a tie, where every file chooses
alike: of model.gguf in Q4_1 for `support-inbox`, the proof on kept rows said 98 % at a score of 0.69 instead of 0.71.

What counts is the answer. With labels, a row is one choice: the same up to the token at which the trained model leaves
the compared answer, since what comes after that is of an answer that it would not give. In a free answer each token is
one.

Whether one row of 48 changes or four is chance: of a file that changes 5 %, one in three such samples shows 97 % kept
or more. So the share is estimated from all rows: what a file does to the lead of the likeliest token over the second
one is noise of some size, and changes a choice with the probability that it is larger than the lead.
"""

import math
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
    expected_share: float  # of rows like these, from the noise on all of them
    mean_kl_nats: float


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

    n_equal = 0
    leads, shifts, kl_nats = [], [], []
    for (tokens, first), reference, other in zip(sequences, trained, served, strict=True):
        chosen = reference.argmax(axis=-1)
        answer = np.array(tokens[first + 1 :])
        leaves = np.flatnonzero(chosen[: len(answer)] != answer[: len(chosen)])
        end = leaves[0] + 1 if len(leaves) else len(answer)  # nothing is asked after the answer's end
        equal = chosen[:end] == other[:end].argmax(axis=-1)
        lead, shift = _leads(reference[:end], other[:end])
        if by_row:
            place = [int(lead.argmin())]  # where the labels part
            lead, shift, equal = lead[place], shift[place], equal.all(keepdims=True)
        leads.append(lead)
        shifts.append(shift)
        n_equal += int(equal.sum())
        log_p, log_q = log_softmax(reference[:end]), log_softmax(other[:end])
        kl_nats.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    lead = np.concatenate(leads)
    return Kept(
        n_choices=len(lead),
        n_equal=n_equal,
        expected_share=_expected_share(lead, np.concatenate(shifts)),
        mean_kl_nats=float(np.concatenate(kl_nats).mean()),
    )


def _leads(reference: Logits, other: Logits) -> tuple[Logits, Logits]:
    """By how much the likeliest token leads the second one, in nats, and by how much the other file moves that."""
    import numpy as np

    two = np.argpartition(reference, -2, axis=-1)[:, -2:]
    of_reference, of_other = (np.take_along_axis(logits, two, axis=-1) for logits in (reference, other))
    lead = of_reference[:, 1] - of_reference[:, 0]  # the last one is the largest
    return lead, of_other[:, 1] - of_other[:, 0] - lead


def _expected_share(leads: Logits, shifts: Logits) -> float:
    """The share of choices that normal noise of the shifts' size leaves, on average over these leads.

    The size is that of the half nearest to a tie: sure choices move by more, and do not change.
    """
    nearest = leads.argsort(kind="stable")[: (len(leads) + 1) // 2]
    noise = math.sqrt(float((shifts[nearest].astype(float) ** 2).mean()))
    if not noise:
        return 1.0
    return sum(0.5 * (1 + math.erf(lead / noise / math.sqrt(2))) for lead in leads.tolist()) / len(leads)
