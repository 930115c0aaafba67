"""Chooses the way of asking for inputs: each way is tried on a few inputs; the one with the most usable ones wins.

    {"style": "turns", "made": 32, "good": 27, "agreement": 0.7778, "form_filter": true}     a Trial
    best_style([...], n_labels=4) -> "turns"

The model of SELF-GUIDE follows the paper's request; smaller models copy or drift, so the choice is measured. Of ways
that are about equally good, the first in INPUT_PROMPTS wins: the paper's, then the one that keeps to the label best.
"""

from collections.abc import Sequence

from sg_local.selfguide.labels import reliability
from sg_local.selfguide.rows import Trial

TOLERANCE = 0.1  # of a yield; about one standard error with 32 trial inputs


def yield_of_good(trial: Trial, n_labels: int) -> float:
    """The expected share of made inputs that pass the filters and fit their made-for label, 0..1."""
    good, agreement = trial["good"], trial["agreement"]
    if agreement is None or not good:
        return good / trial["made"]
    return good / trial["made"] * reliability(round(agreement * good), good, n_labels)


def best_style(trials: Sequence[Trial], n_labels: int) -> str:
    """The first style whose yield is within TOLERANCE of the best, and at least half of it.

    n_labels is 0 for a task without labels.
    """
    yields = [yield_of_good(trial, n_labels) for trial in trials]
    least = max(max(yields) - TOLERANCE, max(yields) / 2)
    return next(trial["style"] for trial, share in zip(trials, yields, strict=True) if share >= least)
