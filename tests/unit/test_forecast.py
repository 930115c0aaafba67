"""What made data foresees of the training, and how a bench counts what came of it."""

from typing import Any

import pytest
from messages import assert_says

from sg_local.report.bench import in_words, summary
from sg_local.selfguide.forecast import forecast, forecast_line
from sg_local.selfguide.statistics import Verdict

MADE_FOR = ["refund", "login"] * 20
ALL_REFUND = ["refund"] * 40
OTHERS = ["login", "refund"] * 20


@pytest.mark.parametrize(
    ("few_shot", "chosen", "shares", "verdict"),
    [
        (ALL_REFUND, MADE_FOR, (0.5, 1.0), Verdict.BETTER),
        (ALL_REFUND, ALL_REFUND, (0.5, 0.5), Verdict.NO_DIFFERENCE),
        (ALL_REFUND, [*MADE_FOR[:8], *ALL_REFUND[8:]], (0.5, 0.6), Verdict.NO_DIFFERENCE),  # 4 rows of 40
        (ALL_REFUND, OTHERS, (0.5, 0.0), Verdict.WORSE),
    ],
)
def test_a_gain_is_foreseen_where_the_chosen_labels_fit_significantly_more_often(
    few_shot: list[str], chosen: list[str], shares: tuple[float, float], verdict: Verdict
) -> None:
    found = forecast(few_shot, chosen, MADE_FOR)
    assert found is not None
    assert (found["few_shot_share"], found["chosen_share"], found["verdict"]) == (*shares, verdict)
    line = forecast_line(found)
    assert_says(line, f"{shares[1]:.0%} of 40 rows", f"few-shot answers in {shares[0]:.0%}")
    assert ("is likely" in line) == (verdict == Verdict.BETTER)
    assert ("not to be foreseen" in line) == (verdict != Verdict.BETTER)


def test_rows_that_were_made_for_no_label_say_nothing() -> None:
    assert forecast(ALL_REFUND, MADE_FOR, [None] * 40) is None
    found = forecast(ALL_REFUND, MADE_FOR, [*MADE_FOR[:10], *[None] * 30])
    assert found is not None
    assert (found["n_rows"], found["chosen_share"], found["few_shot_share"]) == (10, 1.0, 0.5)


def row(task: str, foreseen: Verdict | None, came: Verdict) -> Any:
    """A row of a bench's table."""
    gain = {"mean": 0.1, "interval_95": [0.0, 0.2], "p": 0.01, "verdict": came}
    return {
        "task": task,
        "kind": "classification",
        "n_rows": 100,
        "minutes": 4.0,
        "scores": {"base_few_shot": 0.5, "tuned_merged": 0.6},
        "gain": gain,
        "gain_over_best": gain,
        "no_label_share": {"base_few_shot": 0.0, "tuned_merged": 0.0},
        "label_distance": {"base_few_shot": 0.0, "tuned_merged": 0.0},
        "agreement": None,
        "forecast": foreseen and {"verdict": foreseen},
    }


def test_a_bench_tells_how_often_a_foreseen_gain_came() -> None:
    rows = [
        row("a", Verdict.BETTER, Verdict.BETTER),
        row("b", Verdict.BETTER, Verdict.NO_DIFFERENCE),
        row("c", Verdict.NO_DIFFERENCE, Verdict.BETTER),
        row("d", Verdict.WORSE, Verdict.WORSE),
        row("e", Verdict.NO_DIFFERENCE, Verdict.NO_DIFFERENCE),
        row("older", None, Verdict.BETTER),
    ]
    totals = summary(rows)["classification"]
    assert totals["forecasts"] == {"foreseen": 2, "foreseen_better": 1, "others": 3, "others_better": 1}
    assert_says(in_words(totals), "foreseen in 2 and came in 1", "of the 3 others 1 gained")
    without = summary([row("older", None, Verdict.BETTER)])["classification"]
    assert "foreseen" not in in_words(without)
