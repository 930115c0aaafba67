"""What made data is like, in numbers: what was dropped and why, how varied it is, and how near to the demonstrations.

    data_report(inputs, rows, task)     rows of inputs.jsonl and of train.jsonl
    -> {"attempts": 256, "dropped": {"near_duplicate": {"n": 31, "by_label": {"refund": 20, "login": 11}}},
        "kept": 139, "distinct_1": 0.41, "distinct_2": 0.83, "nearest_rouge_l": 0.38,
        "input_characters": {"made": [21, 40, 52, 70, 118], "demonstrations": [26, 35, 41, 44, 47]},
        "labels": {"refund": {"made_for": 64, "annotated": 71, "kept": 55, "shown": 60, "demonstrations": 1}}}

Sources: distinct-n is the share of distinct n-grams among all (Li et al. 2016, arXiv 1510.03055); likeness to the
nearest other input is Self-Instruct's measure of diversity (arXiv 2212.10560, figure 4).
"""

import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rapidfuzz.distance import LCSseq

from sg_local.selfguide.metrics import normalize, words
from sg_local.task import Task

Row = dict[str, Any]

# Pairs grow with the square of the rows; as many, drawn by a fixed seed, tell the mean to a point or two.
MAX_COMPARED = 500
# A warning is given where a number is past what a person would look at twice.
MAX_NEAREST_ROUGE_L = 0.6  # 0.7 is where inputs are dropped as near-duplicates
MAX_LIKE_DEMONSTRATIONS = 0.3  # share of inputs that have half of a demonstration's words in its order
LIKE_ROUGE_L = 0.5
MAX_SHARE_OF_ONE_ANSWER = 0.5  # in a task without labels
MAX_LABELS_IN_A_LINE = 6  # more are in the manifest
MIN_SHARE_OF_A_LABEL = 0.25  # of its equal share


def data_report(
    inputs: Sequence[Row], rows: Sequence[Row], task: Task, gold_ids: Iterable[Any]
) -> dict[str, Any]:
    """Numbers of all that was made. Characters are [least, quartiles, most]; shares are 0..1, of kept made rows.

    rows are of train.jsonl; those with an id in gold_ids are the demonstrations.
    """
    gold = set(gold_ids)
    made = [row for row in rows if row["id"] not in gold]
    kept = [row for row in made if row["drop"] is None]
    texts = [row["input"] for row in kept]
    shown = [example.input for example in task.examples]
    found: dict[str, Any] = {
        "attempts": len(inputs),
        "dropped": _drops(inputs, made),
        "kept": len(kept),
        "distinct_1": _distinct(texts, 1),
        "distinct_2": _distinct(texts, 2),
        **_nearness(texts, shown),
        "input_characters": {"made": _spread(texts), "demonstrations": _spread(shown)},
    }
    if task.is_classification:
        found["labels"] = {
            label: {
                "made_for": sum(row["label"] == label for row in inputs if row["drop"] is None),
                "annotated": sum(row["output"] == label for row in made),
                "kept": sum(row["output"] == label for row in kept),
                "shown": sum(row["copies"] for row in rows if row["output"] == label),
                "demonstrations": sum(example.output == label for example in task.examples),
            }
            for label in task.labels
        }
        return found
    answers = Counter(normalize(row["output"]) for row in kept)
    copies = sum(normalize(row["output"]) == normalize(row["input"]) for row in kept)
    return found | {
        "output_characters": {
            "made": _spread([row["output"] for row in kept]),
            "demonstrations": _spread([example.output for example in task.examples]),
        },
        "distinct_outputs": len(answers),
        "commonest_output_share": _share(max(answers.values(), default=0), len(kept)),
        "copied_input_share": _share(copies, len(kept)),
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as a table to read."""
    total = max(1, report["attempts"])
    lines = [f"{report['attempts']:>6} inputs were asked for"]
    for reason, entry in report["dropped"].items():
        labels = [f"{n} {label}" for label, n in entry["by_label"].items()]
        by_label = ", ".join(labels if len(labels) <= MAX_LABELS_IN_A_LINE else [])
        lines.append(f"{-entry['n']:>6} {reason:<16} {entry['n'] / total:>4.0%}  {by_label}".rstrip())
    lines.append(f"{report['kept']:>6} made rows are left")
    lines.append("")
    lines.append(f"{'characters':<18}{'least':>7}{'1/4':>6}{'1/2':>6}{'3/4':>6}{'most':>6}   demonstrations")
    for key, name in (("input_characters", "input"), ("output_characters", "output")):
        if key in report:
            made, shown = report[key]["made"], report[key]["demonstrations"]
            cells = "".join(f"{value:>6}" for value in made)
            lines.append(f"{name:<19}{cells}   {shown[0]} to {shown[-1]}")
    lines.append(
        f"distinct words {report['distinct_1']:.0%}, pairs of words {report['distinct_2']:.0%}; ROUGE-L with the "
        f"nearest other {report['nearest_rouge_l']:.2f}; {report['like_demonstrations_share']:.0%} resemble a "
        "demonstration"
    )
    if "labels" in report:
        width = max(len("label"), *map(len, report["labels"]))
        keys = ("made_for", "annotated", "kept", "shown", "demonstrations")
        lines += ["", f"{'label':<{width}}" + "".join(f"{key.replace('_', ' '):>11}" for key in keys[:4])
                  + "   demonstrations"]  # fmt: skip
        for label, counts in report["labels"].items():
            cells = "".join(f"{counts[key]:>11}" for key in keys[:4])
            lines.append(f"{label:<{width}}{cells}   {counts['demonstrations']:>14}")
    else:
        lines.append(
            f"{report['distinct_outputs']} distinct answers, the commonest {report['commonest_output_share']:.0%} "
            f"of the rows; {report['copied_input_share']:.0%} repeat their input"
        )
    return lines


def warnings(report: dict[str, Any]) -> list[str]:
    """What looks bad, and what helps; one line each."""
    found = []
    if report["nearest_rouge_l"] > MAX_NEAREST_ROUGE_L:
        found.append(
            f"inputs resemble each other (ROUGE-L {report['nearest_rouge_l']:.2f} with the nearest): raise "
            "--input-temperature, or give demonstrations that differ more"
        )
    if report["like_demonstrations_share"] > MAX_LIKE_DEMONSTRATIONS:
        found.append(
            f"{report['like_demonstrations_share']:.0%} of the inputs resemble a demonstration: try another "
            "--input-prompt, or lower --near-duplicate-rouge-l"
        )
    if report.get("commonest_output_share", 0) > MAX_SHARE_OF_ONE_ANSWER:
        found.append(
            f"one answer makes {report['commonest_output_share']:.0%} of the rows: look at them with --explain, and "
            "say in the instruction what an answer is"
        )
    labels = report.get("labels", {})
    equal = sum(counts["kept"] for counts in labels.values()) / max(1, len(labels))
    for label, counts in labels.items():
        if counts["kept"] < MIN_SHARE_OF_A_LABEL * equal:
            found.append(
                f"{counts['kept']} made rows have the label {label!r}, equal numbers would be {equal:.0f}: give a "
                "demonstration of it, or a word that says more"
            )
    return found


def _drops(inputs: Sequence[Row], made: Sequence[Row]) -> dict[str, Any]:
    """Reason -> count and counts by label (the one it was made for, or once annotated its own), commonest first."""
    reasons: dict[str, Counter[str | None]] = {}
    for row, label in (
        *((row, row["label"]) for row in inputs),
        *((row, row["output"]) for row in made),
    ):
        if row["drop"]:
            reasons.setdefault(row["drop"], Counter())[label] += 1
    known = {row["label"] for row in inputs} - {None}
    ordered = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))
    return {
        reason: {
            "n": counts.total(),
            "by_label": {label: n for label, n in sorted(counts.items(), key=str) if label in known},
        }
        for reason, counts in ordered
    }


def _distinct(texts: Sequence[str], n: int) -> float:
    grams = [
        tuple(found[start : start + n]) for found in map(words, texts) for start in range(len(found) - n + 1)
    ]
    return _share(len(set(grams)), len(grams))


def _nearness(texts: Sequence[str], shown: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-L with the nearest other text, and the share of texts that are like one of the shown ones."""
    drawn = random.Random(0).sample(list(texts), min(len(texts), MAX_COMPARED))
    pool = [words(text) for text in drawn]
    others = [words(text) for text in shown]
    nearest = [
        max((_like(own, other) for place, other in enumerate(pool) if place != index), default=0.0)
        for index, own in enumerate(pool)
    ]
    like = sum(any(_like(own, other) >= LIKE_ROUGE_L for other in others) for own in pool)
    return {
        "nearest_rouge_l": round(statistics.fmean(nearest), 4) if nearest else 0.0,
        "like_demonstrations_share": _share(like, len(pool)),
    }


def _like(one: list[str], other: list[str]) -> float:
    """ROUGE-L F-measure of two lists of words."""
    total = len(one) + len(other)
    return 2 * LCSseq.similarity(one, other) / total if total else 0.0


def _spread(texts: Sequence[str]) -> list[int]:
    """Least, quartiles and most of the lengths in characters; zeros without texts."""
    lengths = sorted(map(len, texts))
    if not lengths:
        return [0] * 5
    return [lengths[round(part * (len(lengths) - 1) / 4)] for part in range(5)]


def _share(part: int, total: int) -> float:
    return round(part / total, 4) if total else 0.0
