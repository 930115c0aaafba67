"""The ways of answering that `evaluate` scores side by side, as evaluation.json and the tables call them."""

from typing import Any

BASELINE = "base_few_shot"
FIRST_LINE = "base_few_shot_first_line"
LABEL_SCORING = "base_label_scoring"
MANY_SHOT = "base_many_shot"
TUNED = "tuned_merged"
# The base's ways of answering with demonstrations: the tuned model has to beat the best of them.
OPPONENTS = (BASELINE, FIRST_LINE, LABEL_SCORING, MANY_SHOT)
# Keys of evaluation.json.
GAIN_OVER_BEST = "gain_over_best"
GAINS = {"gain": BASELINE, "gain_over_first_line": FIRST_LINE, "gain_over_label_scoring": LABEL_SCORING}


def strongest_opponent(scores: dict[str, Any], metric: str) -> str:
    """Of the contenders that have scores, the base's way with the highest mean; the first of OPPONENTS among equals.

    It is chosen on the rows that it is compared on, which favours the base.
    """
    there = [name for name in OPPONENTS if name in scores]
    return max(there, key=lambda name: float(scores[name][metric]["mean"]))
