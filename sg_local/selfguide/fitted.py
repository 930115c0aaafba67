"""Label scores of real inputs, mended by what made inputs were made for.

    fitted_scores(made, made_for, real)    made, real: (n_rows, n_prompts, n_labels), log-probabilities in nats
    -> Fitted(scores=[[-0.9, 0.4], ...], agreed=161)                   scores: (n_real, n_labels), of one prompt

Calibration takes away how far all rows lean to a label. What is left is how one label is taken for another, and how
much each prompt says. Both are learned from made inputs and the labels that they were made for: a linear map from the
scores of all prompts to labels, by cross-entropy, which a ridge penalty holds to the mean over the prompts.

A made-for label is wrong in many rows. Where the student follows labels it is right more often than by chance, and a
map from few numbers learns what rows have in common; `agreed` tells it apart: how many rows, each by a map that was not
fitted on it, get the label that they were made for.

Source: matrix scaling (arXiv 1706.04599, section 4.2), with the penalty of arXiv 1910.12656 on the distance from the
mean over prompts in place of that from the identity.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

Scores = Sequence[Sequence[Sequence[float]]]  # (n_rows, n_prompts, n_labels)

MIN_ROWS_OF_A_LABEL = 10
MAX_LABELS = 30  # a map has n_prompts * n_labels**2 numbers
PENALTY = 20.0  # times half of the sum of squares, against nats summed over rows
N_FOLDS = 10
MAX_STEPS = 200


class Fitted(NamedTuple):
    """What a map says of real rows, and how well maps fit rows that they have not seen."""

    scores: list[list[float]]  # (n_real, n_labels), in nats but for a number that all labels of a row share
    agreed: int  # made rows that get the label that they were made for


def fitted_scores(made: Scores, made_for: Sequence[int], real: Scores) -> Fitted | None:
    """The scores of real rows by a map that is fitted on made ones; made_for: the place of each one's label.

    None where a label has few made rows, or labels are many.
    """
    import numpy as np

    n_labels = len(real[0][0])
    n_rows_of = np.bincount(np.asarray(made_for, int), minlength=n_labels)
    if n_labels > MAX_LABELS or n_rows_of.min() < MIN_ROWS_OF_A_LABEL:
        return None
    # Made and real rows lean to labels in ways of their own: each batch loses its own mean.
    rows, others = _centred(made), _centred(real)
    scale = max(float(rows.std()), 1e-6)
    rows, others = rows / scale, others / scale
    labels = np.asarray(made_for)
    folds = _folds(labels)
    agreed = 0
    for fold in range(N_FOLDS):
        held = folds == fold
        weights, biases = _fit(rows[~held], labels[~held], n_labels)
        agreed += int(((rows[held] @ weights + biases).argmax(axis=1) == labels[held]).sum())
    weights, biases = _fit(rows, labels, n_labels)
    return Fitted((others @ weights + biases).tolist(), agreed)


def _centred(scores: Scores) -> "Array":
    """Shape (n_rows, n_prompts * n_labels), without the mean over the rows."""
    import numpy as np

    array = np.asarray(scores, float).reshape(len(scores), -1)
    centred: Array = array - array.mean(axis=0)
    return centred


def _folds(labels: "Array") -> "Array":
    """The fold of each row: those of a label are dealt out in turn."""
    import numpy as np

    folds = np.zeros(len(labels), int)
    for label in set(labels.tolist()):
        places = np.flatnonzero(labels == label)
        folds[places] = np.arange(len(places)) % N_FOLDS
    return folds


def _fit(rows: "Array", labels: "Array", n_labels: int) -> tuple["Array", "Array"]:
    """Weights (n_prompts * n_labels, n_labels) and biases: a free multiple of the mean over prompts, and what is added.

    rows: centred and scaled.
    """
    import numpy as np
    from scipy.optimize import minimize

    mean = np.tile(np.eye(n_labels), (rows.shape[1] // n_labels, 1))
    right = np.eye(n_labels)[labels]

    def parts(values: "Array") -> tuple[float, "Array", "Array"]:
        return values[0], values[1:-n_labels].reshape(mean.shape), values[-n_labels:]

    def loss(values: "Array") -> tuple[float, "Array"]:
        multiple, added, biases = parts(values)
        scores = rows @ (multiple * mean + added) + biases
        scores -= scores.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(scores).sum(axis=1, keepdims=True))
        errors = np.exp(scores - log_sums) - right
        by_weight = rows.T @ errors
        gradient = [[(by_weight * mean).sum()], (by_weight + PENALTY * added).ravel(), errors.sum(axis=0)]
        nats = float((log_sums - scores)[right > 0].sum())
        return nats + PENALTY / 2 * float((added**2).sum()), np.concatenate(gradient)

    start = np.zeros(1 + mean.size + n_labels)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS}).x
    multiple, added, biases = parts(found)
    return multiple * mean + added, biases
