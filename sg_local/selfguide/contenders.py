"""The contenders: the ways of answering that `evaluate` scores side by side.

    Contender.LABEL_SCORING            "base_label_scoring", its key in evaluation.json and its file in predictions/
    Contender.LABEL_SCORING.heading    "label scoring", the head of its column in a table of many tasks

A contender is one entry here; stages/evaluate.py says how it answers. Tables list them in this order.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


@dataclass(frozen=True)
class _Entry:
    key: str
    heading: str
    is_opponent: bool = False  # the verdict and --gate compare with the best opponent
    gain_key: str = ""  # of the gain over it in evaluation.json; "": only gain_over_best may be over it
    needs_labels: bool = False
    is_optional: bool = False  # only some runs have it
    uses_made_rows: bool = False


class Contender(StrEnum):
    """A way of answering; the value is its key in JSON."""

    heading: str
    is_opponent: bool
    gain_key: str
    needs_labels: bool
    is_optional: bool
    uses_made_rows: bool

    def __new__(cls, entry: _Entry) -> Self:
        contender = str.__new__(cls, entry.key)
        contender._value_ = entry.key
        contender.heading = entry.heading
        contender.is_opponent, contender.gain_key = entry.is_opponent, entry.gain_key
        contender.needs_labels, contender.is_optional = entry.needs_labels, entry.is_optional
        contender.uses_made_rows = entry.uses_made_rows
        return contender

    ZERO_SHOT = _Entry("base_zero_shot", "zero-shot", is_opponent=True)
    FEW_SHOT = _Entry("base_few_shot", "few-shot", is_opponent=True, gain_key="gain")
    FIRST_LINE = _Entry(
        "base_few_shot_first_line",
        "its first line",
        is_opponent=True,
        gain_key="gain_over_first_line",
        is_optional=True,
    )
    LABEL_SCORING = _Entry(
        "base_label_scoring",
        "label scoring",
        is_opponent=True,
        gain_key="gain_over_label_scoring",
        needs_labels=True,
    )
    MANY_SHOT = _Entry("base_many_shot", "many-shot", is_opponent=True, is_optional=True, uses_made_rows=True)
    TUNED_ADAPTER = _Entry("tuned_adapter", "tuned adapter", uses_made_rows=True)
    TUNED_MERGED = _Entry("tuned_merged", "tuned merged", uses_made_rows=True)

    def is_expected(self, *, with_labels: bool) -> bool:
        """Whether every evaluation has it: of tasks with labels, or of tasks without."""
        return not self.is_optional and (with_labels or not self.needs_labels)


# The contender whose gain is measured, and the baseline of the first gain.
TUNED, BASELINE = Contender.TUNED_MERGED, Contender.FEW_SHOT
CONTENDERS = {str(contender): contender for contender in Contender}  # by their keys
# Of those that score alike, the first is compared with: first those whose gain has a place of its own.
OPPONENTS = tuple(
    sorted((contender for contender in Contender if contender.is_opponent), key=lambda one: not one.gain_key)
)
