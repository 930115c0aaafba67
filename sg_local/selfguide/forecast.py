"""Will the training help? Foreseen before it, from made data alone, in tasks with labels.

    forecast(few_shot, chosen, made_for)
    -> {"few_shot_share": 0.3939, "chosen_share": 0.6414, "n_rows": 198, "p": 1.1e-08, "verdict": "better"}

An input is made for a label. Two answers to it are held against that label: the base's own few-shot answer, and the
label that is chosen for training, before what the input was made for counts as evidence. Where the chosen ones fit
significantly more often, the tuned model learns from better answers than the base gives, and a gain over few-shot
prompting is foreseen. Nothing is fitted here: the test is that of the scores, on other rows.

How often that came true is in tests/benchmarks/RESULTS.md; `sg-local bench` counts it for its own tasks.
"""

from collections.abc import Sequence
from typing import TypedDict

from sg_local.selfguide.statistics import Verdict, paired_test, verdict


class Forecast(TypedDict):
    """What is foreseen of the tuned model, as in the manifest."""

    few_shot_share: float  # of the rows whose few-shot answer is the label that they were made for
    chosen_share: float  # of those whose chosen label is
    n_rows: int
    p: float  # paired test of the two
    verdict: Verdict  # of the tuned model beside few-shot prompting


def forecast(
    few_shot: Sequence[str], chosen: Sequence[str], made_for: Sequence[str | None]
) -> Forecast | None:
    """What made rows say, in the same order; None where no row was made for a label."""
    rows = [
        (float(answer == label), float(choice == label))
        for answer, choice, label in zip(few_shot, chosen, made_for, strict=True)
        if label is not None
    ]
    if not rows:
        return None
    before, after = zip(*rows, strict=True)
    few_shot_share, chosen_share = sum(before) / len(rows), sum(after) / len(rows)
    p = paired_test(after, before)
    return {
        "few_shot_share": round(few_shot_share, 4),
        "chosen_share": round(chosen_share, 4),
        "n_rows": len(rows),
        "p": float(f"{p:.3g}"),
        "verdict": verdict(p, chosen_share - few_shot_share),
    }


def forecast_line(foreseen: Forecast) -> str:
    """It in words, for people."""
    fits = (
        f"the labels to train on fit what inputs were made for in {foreseen['chosen_share']:.0%} of "
        f"{foreseen['n_rows']} rows, the base's few-shot answers in {foreseen['few_shot_share']:.0%}"
    )
    if foreseen["verdict"] == Verdict.BETTER:
        return f"a gain over few-shot prompting is likely: {fits}"
    return (
        f"a gain over few-shot prompting is not to be foreseen: {fits} (p = {foreseen['p']:.2g}); some "
        "rows that you label help most (`labelled`, `sg-local review`), then real inputs, then a larger model"
    )
