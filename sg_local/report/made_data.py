"""What made data is like, in numbers: what was dropped and why, how varied it is, and how near to the demonstrations.

    data_report(inputs, outputs, rows, task)     rows of inputs.jsonl, outputs.jsonl and train.jsonl
    -> {"attempts": 256,
        "dropped": {"generate": {"near_duplicate": {"n": 31, "by_label": {"refund": 20, "login": 11}}},
                    "annotate": {}, "curate": {"low_confidence": {"n": 40, "by_label": {"refund": 22, "login": 18}}}},
        "kept": 139, "distinct_1": 0.41, "distinct_2": 0.83, "nearest_rouge_l": 0.38, "nearest_rouge_l_rows": 139,
        "like_demonstrations": {"from_rouge_l": 0.5, "input_share": 0.04},
        "input_characters": {"made": {"min": 21, "quartiles": [40, 52, 70], "max": 118}, "demonstrations": {...}},
        "labels": {"refund": {"made_for": 64, "annotated": 71, "kept": 55, "shown": 60, "longer_share": 0.55,
                              "demonstrations": 1}}}

Sources: distinct-n is the share of distinct n-grams among all (Li et al. 2016, arXiv 1510.03055), which falls as rows
grow, so compare it between runs of one size; likeness to the nearest other input is Self-Instruct's measure of
diversity (arXiv 2212.10560, figure 4).
"""

import random
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from rapidfuzz.distance import LCSseq

from sg_local.selfguide.filters import LENGTH_SLACK_CHARACTERS
from sg_local.selfguide.metrics import normalize, words
from sg_local.task import Example, Task

Row = dict[str, Any]
Drops = dict[str, dict[str, Any]]

# Pairs grow with the square of the rows. So many take about a second; more rows are told by a sample of them, drawn by
# a fixed seed, each against all the others. 50 of them tell the mean to 0.02 or 0.03.
MAX_COMPARISONS = 500_000
MIN_COMPARED = 50
# A warning is given where a number is past what a person would look at twice.
MAX_NEAREST_ROUGE_L = 0.6  # 0.7 is where inputs are dropped as near-duplicates
MAX_LIKE_DEMONSTRATIONS = 0.3  # share of inputs that have half of a demonstration's words in its order
LIKE_ROUGE_L = 0.5  # or as much as two demonstrations are alike: then it is the task's form
MAX_SHARE_OF_ONE_ANSWER = 0.5  # in a task without labels
MAX_SHARE_OF_COPIED_INPUTS = 0.25  # as answers, where no demonstration does that
MAX_LENGTH_RATIO = 2  # of a median to the longest demonstration, and of the shortest one to a median
MIN_SHARE_OF_A_LABEL = 0.25  # of its equal share
MAX_LABELS_IN_A_LINE = 6  # of more the commonest are shown; all are in the manifest
MAX_LABELS_IN_TABLE = 30
MAX_WARNED_LABELS = 3
MIN_ROWS_OF_A_LABEL = 10  # before its lengths are compared with the others'
MAX_LONGER_SHARE = 0.75  # of pairs of rows: chance is 0.5, and two standard errors with 40 rows 0.13
MAX_P_OF_AGREEMENT = 0.05  # of labels and what inputs were made for; above it may be chance


def data_report(
    inputs: Sequence[Row], outputs: Sequence[Row], rows: Sequence[Row], task: Task
) -> dict[str, Any]:
    """Numbers of all that was made. Shares are 0..1, of kept made rows; rows that no input has are demonstrations."""
    made_for = {row["id"]: row["label"] for row in inputs}
    made = [row for row in rows if row["id"] in made_for]
    kept = [row for row in made if row["drop"] is None]
    texts = [row["input"] for row in kept]
    unanswered = {row["id"] for row in outputs if row["drop"]}
    found: dict[str, Any] = {
        "attempts": len(inputs),
        # Of a label: made for it, until it was annotated its own.
        "dropped": {
            "generate": _drops([(row["drop"], row["label"]) for row in inputs], task.labels),
            "annotate": _drops([(row["drop"], made_for[row["id"]]) for row in outputs], task.labels),
            "curate": _drops(
                [(row["drop"], row["output"]) for row in made if row["id"] not in unanswered], task.labels
            ),
        },
        "kept": len(kept),
        "distinct_1": _distinct(texts, 1),
        "distinct_2": _distinct(texts, 2),
        **_nearest(texts),
        "like_demonstrations": _like_demonstrations(kept, task),
        "input_characters": {
            "made": _spread(texts),
            "demonstrations": _spread([example.input for example in task.examples]),
        },
        "output_characters": {
            "made": _spread([row["output"] for row in kept]),
            "demonstrations": _spread([example.output for example in task.examples]),
        },
    }
    if task.is_classification:
        return found | {
            "labels": {label: _label_counts(label, inputs, made, rows, task) for label in task.labels}
        }
    answers = Counter(normalize(row["output"]) for row in kept)
    commonest, n_commonest = answers.most_common(1)[0] if answers else ("", 0)
    return found | {
        "distinct_outputs": len(answers),
        "commonest_output_share": _share(n_commonest, len(kept)),
        "commonest_output_id": next(
            (row["id"] for row in kept if normalize(row["output"]) == commonest), None
        ),
        "copied_input_share": {
            "made": _copied(Example(row["input"], row["output"]) for row in kept),
            "demonstrations": _copied(task.examples),
        },
    }


def report_lines(report: dict[str, Any], agreement: dict[str, Any] | None = None) -> list[str]:
    """The report as tables to read, with the agreement of labels and what inputs were made for, as curate tells it."""
    left = report["attempts"]
    lines = [f"{left:>6} inputs were asked for"]
    for stage, told in (("generate", "inputs to answer"), ("annotate", "answers"), ("curate", "")):
        for reason, entry in report["dropped"][stage].items():
            share = entry["n"] / report["attempts"]
            line = f"{-entry['n']:>6} {reason:<16} {share:>4.0%}  {_by_label(entry['by_label'])}"
            lines.append(line.rstrip())
            left -= entry["n"]
        if told and (stage == "generate" or report["dropped"][stage]):
            lines.append(f"{left:>6} {told}")
    lines += [f"{report['kept']:>6} made rows are left", ""]
    lines.append(f"{'characters':<18}{'least':>7}{'1/4':>6}{'1/2':>6}{'3/4':>6}{'most':>6}   demonstrations")
    for name in _told_lengths(report):
        made, shown = report[f"{name}_characters"]["made"], report[f"{name}_characters"]["demonstrations"]
        cells = "".join(f"{value:>6}" for value in (made["min"], *made["quartiles"], made["max"]))
        lines.append(f"{name:<19}{cells}   {shown['min']} to {shown['max']}")
    compared = report["nearest_rouge_l_rows"]
    drawn = f" (by {compared} of them)" if compared < report["kept"] else ""
    lines.append(
        f"distinct words {report['distinct_1']:.0%}, pairs of words {report['distinct_2']:.0%}; ROUGE-L with the "
        f"nearest other {report['nearest_rouge_l']:.2f}{drawn}"
    )
    like = report["like_demonstrations"]
    outputs = f", {like['output_share']:.0%} of the answers" if "output_share" in like else ""
    lines.append(
        f"{like['input_share']:.0%} of the inputs{outputs} resemble a demonstration (ROUGE-L from "
        f"{like['from_rouge_l']:.2f})"
    )
    if "labels" in report:
        lines += ["", *_label_lines(report["labels"])]
        if agreement:
            lines.append(
                f"the label fits what an input was made for in {agreement['share']:.0%} of {agreement['n_rows']} rows "
                f"(chance: {agreement['chance']:.0%})"
            )
        return lines
    lines.append(
        f"{report['distinct_outputs']} distinct answers, the commonest {report['commonest_output_share']:.0%} "
        f"of the rows; {report['copied_input_share']['made']:.0%} repeat their input"
    )
    return lines


def _told_lengths(report: dict[str, Any]) -> tuple[str, ...]:
    return ("input",) if "labels" in report else ("input", "output")  # labels' lengths tell nothing


def _label_lines(labels: dict[str, dict[str, Any]]) -> list[str]:
    keys = ["made_for", "annotated", "kept", "shown"]
    shown = list(labels.items())[:MAX_LABELS_IN_TABLE]
    width = max(len("label"), *(len(label) for label, _ in shown))
    head = "".join(f"{key.replace('_', ' '):>11}" for key in keys)
    lines = [f"{'label':<{width}}{head}   demonstrations"]
    for label, counts in shown:
        cells = "".join(f"{round(counts[key]):>11}" for key in keys)
        lines.append(f"{label:<{width}}{cells}   {counts['demonstrations']:>14}")
    if len(labels) > len(shown):
        lines.append(f"and {len(labels) - len(shown)} labels more, in manifest.json")
    return lines


def _by_label(counts: dict[str, int]) -> str:
    """Counts by label in a line; of many labels the commonest."""
    told = list(counts.items())
    more = []
    if len(told) > MAX_LABELS_IN_A_LINE:
        told = sorted(told, key=lambda item: -item[1])[: MAX_LABELS_IN_A_LINE // 2]
        more = [f"{len(counts) - len(told)} labels more"]
    return ", ".join([*(f"{n} {label}" for label, n in told), *more])


def warnings(report: dict[str, Any], agreement: dict[str, Any] | None = None) -> list[str]:
    """What looks bad, and what helps; one line each. agreement: as in report_lines."""
    found = []
    if agreement and agreement["p"] > MAX_P_OF_AGREEMENT:
        found.append(
            f"the model hardly tells the labels apart (agreement could be chance, p = {agreement['p']:.2g}): training "
            "can take its bias away, and teaches it little else; a larger model helps most, then labels and an "
            "instruction that say more"
        )
    if report["nearest_rouge_l"] > MAX_NEAREST_ROUGE_L:
        found.append(
            f"inputs resemble each other (ROUGE-L {report['nearest_rouge_l']:.2f} with the nearest): raise "
            "--input-temperature, or give demonstrations that differ more"
        )
    if report["like_demonstrations"]["input_share"] > MAX_LIKE_DEMONSTRATIONS:
        found.append(
            f"{report['like_demonstrations']['input_share']:.0%} of the inputs resemble a demonstration: try another "
            "--input-prompt, or lower --near-duplicate-rouge-l"
        )
    if report.get("commonest_output_share", 0) > MAX_SHARE_OF_ONE_ANSWER:
        found.append(
            f"one answer makes {report['commonest_output_share']:.0%} of the rows: look at one with "
            f"`sg-local explain RUN {report['commonest_output_id']}`, and say in the instruction what an answer is"
        )
    copied = report.get("copied_input_share", {"made": 0.0, "demonstrations": 0.0})
    if copied["made"] > MAX_SHARE_OF_COPIED_INPUTS and not copied["demonstrations"]:
        found.append(
            f"{copied['made']:.0%} of the answers repeat their input: --form-filter drops them; else say in the "
            "instruction what is to be changed"
        )
    for name in _told_lengths(report):
        made, shown = report[f"{name}_characters"]["made"], report[f"{name}_characters"]["demonstrations"]
        median = made["quartiles"][1]
        least = min(shown["min"] / MAX_LENGTH_RATIO, shown["min"] - LENGTH_SLACK_CHARACTERS)
        most = max(shown["max"] * MAX_LENGTH_RATIO, shown["max"] + LENGTH_SLACK_CHARACTERS)
        if report["kept"] and not least <= median <= most:
            found.append(
                f"half of the {name}s have {median} characters or {'less' if median < least else 'more'}, the "
                f"demonstrations' {shown['min']} to {shown['max']}: --length-filter drops such rows; else give "
                "demonstrations of the lengths that you expect"
            )
    labels = report.get("labels", {})
    found += _length_warnings(labels)
    equal = sum(counts["kept"] for counts in labels.values()) / max(1, len(labels))
    rare = [label for label, counts in labels.items() if counts["kept"] < MIN_SHARE_OF_A_LABEL * equal]
    shown = f"{equal:.0f}" if equal >= 1 else "less than one for each"
    for label in rare[:MAX_WARNED_LABELS]:
        found.append(
            f"{labels[label]['kept']} made rows have the label {label!r}, equal numbers would be {shown}: give a "
            "demonstration of it, or a word that says more"
        )
    if len(rare) > MAX_WARNED_LABELS:
        found.append(f"{len(rare) - MAX_WARNED_LABELS} labels more have as few rows: see manifest.json")
    return found


def _length_warnings(labels: dict[str, dict[str, Any]]) -> list[str]:
    """Which labels a model could tell by the length of the input alone."""
    shares = {
        label: counts["longer_share"]
        for label, counts in labels.items()
        if counts["longer_share"] is not None
    }
    told = [
        (label, "longer", share) if share > 0.5 else (label, "shorter", 1 - share)
        for label, share in shares.items()
        if max(share, 1 - share) > MAX_LONGER_SHARE
    ]
    if len(labels) == 2:  # what is longer than the one is shorter than the other
        told = told[:1]
    return [
        f"inputs of {label!r} are {how} than the others in {share:.0%} of the pairs, and the model "
        "may learn that: where real ones are not so, give demonstrations of equal lengths"
        for label, how, share in told[:MAX_WARNED_LABELS]
    ]


def _drops(reasons: Iterable[tuple[str | None, str | None]], labels: Sequence[str]) -> Drops:
    """Reason -> count and counts by label, the commonest reason first; what has no reason was kept."""
    counted: dict[str, Counter[str | None]] = {}
    for reason, label in reasons:
        if reason:
            counted.setdefault(reason, Counter())[label] += 1
    ordered = sorted(counted.items(), key=lambda item: (-item[1].total(), item[0]))
    return {
        reason: {
            "n": counts.total(),
            "by_label": {label: counts[label] for label in labels if counts[label]},
        }
        for reason, counts in ordered
    }


def _label_counts(
    label: str, inputs: Sequence[Row], made: Sequence[Row], rows: Sequence[Row], task: Task
) -> dict[str, Any]:
    own = [row for row in rows if row["output"] == label]
    return {
        "made_for": sum(row["label"] == label for row in inputs if row["drop"] is None),
        "annotated": sum(row["output"] == label for row in made),
        "kept": sum(row["output"] == label for row in made if row["drop"] is None),
        "shown": sum(row["copies"] for row in own),
        "longer_share": _longer_share(own, [row for row in rows if row["output"] != label]),
        "demonstrations": sum(example.output == label for example in task.examples),
    }


def _longer_share(rows: Sequence[Row], others: Sequence[Row]) -> float | None:
    """In which share of the pairs that are shown the input of the first is longer than that of the second.

    Equally long ones count half, so that 0.5 tells nothing (the area under the ROC curve). None where rows are too few.
    """
    own, rest = (
        sorted(len(row["input"]) for row in some for _ in range(row["copies"])) for some in (rows, others)
    )
    if min(sum(row["copies"] > 0 for row in some) for some in (rows, others)) < MIN_ROWS_OF_A_LABEL:
        return None
    twice = sum(bisect_left(rest, length) + bisect_right(rest, length) for length in own)
    return round(twice / 2 / (len(own) * len(rest)), 4)


def _distinct(texts: Sequence[str], n: int) -> float:
    grams = [
        tuple(found[start : start + n]) for found in map(words, texts) for start in range(len(found) - n + 1)
    ]
    return _share(len(set(grams)), len(grams))


def _nearest(texts: Sequence[str]) -> dict[str, Any]:
    """Mean ROUGE-L with the nearest other text, and of how many texts it is the mean."""
    pool = [words(text) for text in texts]
    n_compared = min(len(pool), max(MIN_COMPARED, MAX_COMPARISONS // max(1, len(pool))))
    nearest = []
    for index in random.Random(0).sample(range(len(pool)), n_compared):
        own, best = pool[index], 0.0
        for place, other in enumerate(pool):
            # The LCS is at most the shorter of the two, which settles many pairs.
            if place != index and 2 * min(len(own), len(other)) > best * (len(own) + len(other)):
                best = max(best, _rouge_l(own, other))
        nearest.append(best)
    return {
        "nearest_rouge_l": round(statistics.fmean(nearest), 4) if nearest else 0.0,
        "nearest_rouge_l_rows": n_compared,
    }


def _like_demonstrations(kept: Sequence[Row], task: Task) -> dict[str, float]:
    """Shares of inputs, and of free answers, that have the words of a demonstration in its order.

    An answer is compared with the demonstrations' answers and inputs.
    """
    shown = [words(example.input) for example in task.examples]
    alike = [_rouge_l(one, other) for one, other in combinations(shown, 2)]
    bound = max([LIKE_ROUGE_L, *alike])

    def share(texts: Iterable[str], others: Sequence[list[str]]) -> float:
        own = [words(text) for text in texts]
        return _share(sum(any(_rouge_l(one, other) >= bound for other in others) for one in own), len(own))

    found = {"from_rouge_l": round(bound, 4), "input_share": share((row["input"] for row in kept), shown)}
    if not task.is_classification:
        others = shown + [words(example.output) for example in task.examples]
        found["output_share"] = share((row["output"] for row in kept), others)
    return found


def _rouge_l(one: list[str], other: list[str]) -> float:
    """ROUGE-L F-measure of two lists of words."""
    total = len(one) + len(other)
    return 2 * LCSseq.similarity(one, other) / total if total else 0.0


def _spread(texts: Sequence[str]) -> dict[str, Any]:
    """Least, quartiles and most of the lengths in characters; zeros without texts."""
    lengths = sorted(map(len, texts)) or [0]
    least, *quartiles, most = (lengths[round(part * (len(lengths) - 1) / 4)] for part in range(5))
    return {"min": least, "quartiles": quartiles, "max": most}


def _copied(pairs: Iterable[Example]) -> float:
    """Share of pairs whose output is their input."""
    same = [normalize(pair.output) == normalize(pair.input) for pair in pairs]
    return _share(sum(same), len(same))


def _share(part: int, total: int) -> float:
    return round(part / total, 4) if total else 0.0
