"""Which way of asking for inputs a student follows: measured on a few trial inputs, not guessed from its name.

    Trial(style="turns", made=24, good=21, agreement=0.71)
    chosen([...], n_labels=4) -> "turns"

The question is open in SELF-GUIDE, whose model follows the paper's words; smaller ones copy or drift. Of ways that are
about equally good the first of INPUT_PROMPTS is taken: the paper's, then the one that keeps to the label best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sg_local.selfguide.selection import reliability

TOLERANCE = 0.1  # of a yield: about one standard error with 32 trial inputs


@dataclass(frozen=True)
class Trial:
    """What came of a few inputs that were asked for in one way."""

    style: str
    made: int
    good: int  # passed the filters: of the demonstrations' form and length, unlike them and each other
    agreement: (
        float | None
    )  # share of the good ones that are annotated as they were made for; None without labels
    form_filter: bool = True  # whether good ones have the demonstrations' form

    def yield_of_good(self, n_labels: int) -> float:
        """Share of made inputs that can be expected to be good, and of the label they were made for; 0..1."""
        if self.agreement is None or not self.good:
            return self.good / self.made
        return self.good / self.made * reliability(round(self.agreement * self.good), self.good, n_labels)


def chosen(trials: Sequence[Trial], n_labels: int) -> str:
    """The first style whose yield is within TOLERANCE of the best one's, and over half of it.

    n_labels is 0 for a task without labels.
    """
    most = max(trial.yield_of_good(n_labels) for trial in trials)
    least = max(most - TOLERANCE, most / 2)
    return next(trial.style for trial in trials if trial.yield_of_good(n_labels) >= least)
