"""The scores of a run as a table to read, and whether the tuned model is worse than the base at its best.

score_table(run)     reads evaluation.json
                      Exact Match  95 % interval  ...
base_few_shot               0.340  0.255 - 0.437
tuned_merged                0.710  0.615 - 0.790
"""

from collections.abc import Sequence
from typing import Any

from sg_local.files import read_json
from sg_local.run.directory import Run
from sg_local.selfguide.contenders import BASELINE, GAIN_OVER_BEST, GAINS, TUNED, strongest_opponent

MAX_EVALUATION_BYTES = 1 << 20
MAX_LABELS_IN_TABLE = 30
# One label for nine rows of ten, where less than three quarters have it, is told in a line.
ONE_ANSWER = 0.9
LESS_THAN = 0.75


def score_table(run: Run) -> str:
    """The evaluation as lines to read: a row for each contender, the gain, and what was scored."""
    evaluation = read_json(run.file("evaluation.json"), MAX_EVALUATION_BYTES)
    metric = evaluation["metric"]
    lines = [f"{run.task.name}: {evaluation['n_rows']} rows, {evaluation['rows_from']}", ""]
    is_classification = run.task.is_classification
    name_width = max(18, *map(len, evaluation["contenders"]))
    lines.append(f"{'':{name_width}}{'Exact Match':>12}  {'95 % interval':15}{'ROUGE-L':>8}  {'95 % interval':15}"
                 + ("no label" if is_classification else ""))  # fmt: skip
    for name, scores in evaluation["contenders"].items():
        cells = [f"{name:{name_width}}"]
        for key, width in (("exact_match", 12), ("rouge_l", 8)):
            low, high = scores[key]["interval_95"]
            cells.append(f"{scores[key]['mean']:>{width}.3f}  {f'{low:.3f} - {high:.3f}':15}")
        if is_classification:
            cells.append(f"{scores['no_label_share']:>8.1%}")
        lines.append("".join(cells))
    lines.append("")
    before, after = (evaluation["contenders"][name].get("labels") for name in (BASELINE, TUNED))
    if before and after:  # runs of earlier versions do not have them
        lines += [*_label_lines(before, after, run.task.labels), ""]
        lines += _one_answer_lines(after, evaluation["n_rows"])
    gains = {GAINS[key]: evaluation[key] for key in GAINS if key in evaluation}
    best = gain_over_best(evaluation)
    for gain in (gains | {best["over"]: best}).values():
        low, high = gain["interval_95"]
        lines.append(
            f"gain in {metric}, {gain['of']} over {gain['over']}: {gain['mean']:+.3f} "
            f"(95 % interval {low:+.3f} to {high:+.3f}, p = {gain['p']:.2g}): {gain['verdict']}"
        )
    lines.append(f"verdict, against the base's best way ({best['over']}): {best['verdict']}")
    return "\n".join(lines)


def gain_over_best(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The gain over the strongest of the base's ways; in a file of an earlier version, of those that it compares."""
    if GAIN_OVER_BEST in evaluation:
        return dict(evaluation[GAIN_OVER_BEST])
    gains = {GAINS[key]: evaluation[key] for key in GAINS if key in evaluation}
    scores = {name: evaluation["contenders"][name] for name in gains}
    return dict(gains[strongest_opponent(scores, evaluation["metric"])])


def _label_lines(before: dict[str, Any], after: dict[str, Any], labels: Sequence[str]) -> list[str]:
    """Which labels base and tuned model give, and how often they are right; and whether one is given to nearly all."""
    none = {"rows": 0, "given": 0, "right": 0}
    told = [label for label in labels if label in before or label in after]
    shown = told[:MAX_LABELS_IN_TABLE]
    width = max(18, *map(len, shown))
    lines = [
        f"{'':{width}}{'':>6}{BASELINE:>18}{TUNED:>18}",
        f"{'label':{width}}{'rows':>6}{'given':>11}{'right':>7}{'given':>11}{'right':>7}",
    ]
    for label in shown:
        base, own = before.get(label, none), after.get(label, none)
        lines.append(
            f"{label:{width}}{own['rows'] or base['rows']:>6}{base['given']:>11}{base['right']:>7}"
            f"{own['given']:>11}{own['right']:>7}"
        )
    if len(told) > len(shown):
        lines.append(f"and {len(told) - len(shown)} labels more, in evaluation.json")
    return lines


def _one_answer_lines(after: dict[str, Any], n_rows: int) -> list[str]:
    """Says so where the tuned model gives one label to nearly all rows, and far fewer have it."""
    return [
        f"{TUNED} says {label!r} to {counts['given']} of {n_rows} rows, and {counts['rows']} are: what it learned from "
        "the made rows does not tell these apart. Compare the inputs in train.jsonl with them; a new run with another "
        "--seed makes others"
        for label, counts in after.items()
        if counts["given"] >= ONE_ANSWER * n_rows and counts["rows"] < LESS_THAN * n_rows
    ]


def worse_than(run: Run) -> str | None:
    """The strongest of the base's ways where the tuned model is significantly worse than it, else None."""
    best = gain_over_best(read_json(run.file("evaluation.json"), MAX_EVALUATION_BYTES))
    return str(best["over"]) if best["verdict"] == "worse" else None
