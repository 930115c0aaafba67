"""The ways of answering that `evaluate` scores side by side, as evaluation.json and the tables call them."""

BASELINE = "base_few_shot"
FIRST_LINE = "base_few_shot_first_line"
LABEL_SCORING = "base_label_scoring"
MANY_SHOT = "base_many_shot"
TUNED = "tuned_merged"
# Keys of evaluation.json.
GAINS = {"gain": BASELINE, "gain_over_first_line": FIRST_LINE, "gain_over_label_scoring": LABEL_SCORING}
