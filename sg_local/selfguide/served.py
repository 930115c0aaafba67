"""Whether a server gives the answers that were scored: what it answered, beside what every contender answered.

    compare(task, {Contender.TUNED_MERGED: [row, ...], ...}, ["delivery", ...])
    -> Comparison(equal={"tuned_merged": 98, "base_few_shot": 31}, tuned="tuned_merged", score=0.69, ...)

What is recorded of the two tuned files differs a little, and a server may serve either: the closer one counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.evaluation import PredictionRow, prediction_row, references_of, scores_of
from sg_local.selfguide.metrics import Metric, metric_of
from sg_local.selfguide.statistics import Difference, Verdict, average, difference
from sg_local.task import Task

# Of the answers. Less may be equal by accident, where there are few labels; more need not be, where answers are long.
SAME_SHARE, LEAD_SHARE = 0.6, 0.2
TUNED_FILES = (TUNED, Contender.TUNED_ADAPTER)


@dataclass(frozen=True)
class Comparison:
    """The same rows answered by a server and by the contenders."""

    rows: Sequence[PredictionRow]  # by the server
    recorded: Sequence[PredictionRow]  # by the tuned file whose answers are closest
    equal: Mapping[Contender, int]  # answers of the server that are those of a contender
    tuned: Contender  # which of the tuned files that is
    metric: Metric
    score: float
    recorded_score: float
    difference: Difference

    @property
    def same_as(self) -> Contender | None:
        """The contender that answered most rows alike, if these are many; None where no one does."""
        closest = max(self.equal, key=lambda contender: (self.equal[contender], contender == self.tuned))
        lead = self.equal[closest] - self.equal[self.tuned]
        is_same = self.equal[closest] >= SAME_SHARE * len(self.rows)
        return closest if is_same and (closest == self.tuned or lead >= LEAD_SHARE * len(self.rows)) else None

    @property
    def is_worse(self) -> bool:
        """Whether the server's answers are significantly worse than those recorded."""
        return self.difference["verdict"] == Verdict.WORSE

    @property
    def differing(self) -> list[int]:
        """The places of the rows whose answers differ."""
        pairs = zip(self.rows, self.recorded, strict=True)
        return [place for place, (row, recorded) in enumerate(pairs) if _differ(row, recorded)]


class PromptCheck(NamedTuple):
    """Whether the server's prompt can be the trained one, None where nothing shows that; and what shows it."""

    is_trained: bool | None
    evidence: str


@dataclass(frozen=True)
class ServerCheck:
    """What a server did with the rows that were sent."""

    url: str
    model: str
    sends: str  # what of a row, in words
    prompt: PromptCheck
    n_thinking: int  # answers before which the model thought
    comparison: Comparison


def compare(
    task: Task, recorded: Mapping[Contender, Sequence[PredictionRow]], answers: Sequence[str]
) -> Comparison:
    """The answers beside those of every contender. recorded: of each the same rows, at least as many as answers."""
    n_rows, metric = len(answers), metric_of(task)
    firsts = {contender: rows[:n_rows] for contender, rows in recorded.items()}
    rows = [
        prediction_row(row["input"], answer, *references_of(row), judge=metric)
        for row, answer in zip(firsts[TUNED], answers, strict=True)
    ]
    equal = {
        contender: sum(not _differ(row, other) for row, other in zip(rows, others, strict=True))
        for contender, others in firsts.items()
    }
    closest = max(equal, key=lambda contender: (equal[contender], contender == TUNED))
    tuned = closest if closest == Contender.TUNED_ADAPTER else TUNED
    after, before = scores_of(rows, metric), scores_of(firsts[tuned], metric)
    return Comparison(
        rows, firsts[tuned], equal, tuned, metric, average(after), average(before), difference(after, before)
    )


def _differ(row: PredictionRow, other: PredictionRow) -> bool:
    return row["prediction"].strip() != other["prediction"].strip()
