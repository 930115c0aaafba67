"""What a review came to, as lines to read: how much was said, and how often the model was right.

review_lines(summary)
60 rows reviewed: 41 as the model answered, 15 corrected, 4 dropped; 22 of them are back that had been dropped
agreement with the model's answers: 0.732 (95 % interval 0.604 to 0.830) on 56 rows; most were chosen as the least
  sure, so it is higher on all rows
on the 14 rows drawn at random among them: 0.857 (95 % interval 0.601 to 0.960), an estimate for all annotated rows
"""

from typing import Any, cast

from sg_local.report import tables
from sg_local.selfguide.review import ReviewSummary
from sg_local.selfguide.statistics import Mean

_COUNTS = ("reviewed", "accepted", "corrected", "dropped", "brought_back", "n_drawn")
_MEANS = ("agreement", "drawn_agreement")


def review_lines(summary: ReviewSummary) -> list[str]:
    """The summary in words; [] where nothing was reviewed."""
    if not summary["reviewed"]:
        return []
    lines = [
        f"{tables.counted(summary['reviewed'], 'row')} reviewed: {summary['accepted']} as the model answered, "
        f"{summary['corrected']} corrected, {summary['dropped']} dropped"
    ]
    if summary["brought_back"]:
        lines[0] += f"; {summary['brought_back']} of them are back that had been dropped"
    if agreement := summary["agreement"]:
        n_answered = summary["accepted"] + summary["corrected"]
        lines.append(
            f"agreement with the model's answers: {_told(agreement)} on {tables.counted(n_answered, 'row')}; most were "
            "chosen as the least sure, so expect more on all rows"
        )
    if drawn := summary["drawn_agreement"]:
        lines.append(
            f"on the {tables.counted(summary['n_drawn'], 'row')} drawn at random among them: {_told(drawn)}, an "
            "estimate for all annotated rows"
        )
    return lines


def recorded_summary(entry: dict[str, Any]) -> ReviewSummary | None:
    """The summary in curate's manifest entry; None where there is none, or another version wrote it."""
    found = entry.get("review")
    if not isinstance(found, dict):
        return None
    is_whole = all(type(found.get(name)) is int for name in _COUNTS) and all(
        _is_mean(found.get(name)) for name in _MEANS
    )
    return cast(ReviewSummary, found) if is_whole else None


def _is_mean(value: object) -> bool:
    match value:
        case None | {"mean": int() | float(), "interval_95": [int() | float(), int() | float()]}:
            return True
    return False


def _told(mean: Mean) -> str:
    low, high = map(tables.score, mean["interval_95"])
    return f"{tables.score(mean['mean'])} (95 % interval {low} to {high})"
