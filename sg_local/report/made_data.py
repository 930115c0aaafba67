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
from typing import NotRequired, TypedDict

from rapidfuzz.distance import LCSseq

from sg_local.report.tables import counted
from sg_local.selfguide.filters import LENGTH_SLACK_CHARACTERS
from sg_local.selfguide.labels import Agreement
from sg_local.selfguide.metrics import normalize, words
from sg_local.selfguide.rows import InputRow, KeptPair, OutputRow, PairRow, Source, is_kept, source_of
from sg_local.task import Example, Task

# Pairs grow with the square of the rows. So many take about a second; of more rows a sample is taken, drawn by
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


class Dropped(TypedDict):
    """How many rows one reason dropped."""

    n: int
    by_label: dict[str, int]


class Resemblance(TypedDict):
    """Which share has the words of an example of the task in its order."""

    from_rouge_l: float
    input_share: float
    output_share: NotRequired[float]  # of free answers


class Spread(TypedDict):
    """Lengths in characters."""

    min: int
    quartiles: list[int]
    max: int


class Lengths(TypedDict):
    """Lengths of made rows, and of the task's examples."""

    made: Spread
    demonstrations: Spread


class CopiedShare(TypedDict):
    """Share of pairs whose output is their input, 0..1."""

    made: float
    demonstrations: float


class LabelCounts(TypedDict):
    """Rows of one label."""

    made_for: int  # inputs that were kept for answering
    annotated: int
    kept: int
    shown: int  # in training, copies and examples included
    longer_share: float | None
    demonstrations: int


class DataReport(TypedDict):
    """What data_report returns, and the manifest keeps: see above."""

    attempts: int
    given: NotRequired[int]  # of these inputs so many are real
    made_kept: NotRequired[int]  # if some are: of the kept rows so many are made, and described below
    has_shares: NotRequired[bool]  # if so: labels are not meant to be equally frequent
    dropped: dict[str, dict[str, Dropped]]  # stage -> reason
    kept: int
    distinct_1: float
    distinct_2: float
    nearest_rouge_l: float  # mean ROUGE-L of an input with the nearest other one
    nearest_rouge_l_rows: int  # of how many inputs it is the mean
    like_demonstrations: Resemblance
    input_characters: Lengths
    output_characters: Lengths
    labels: NotRequired[dict[str, LabelCounts]]  # these with labels, the others without
    distinct_outputs: NotRequired[int]
    commonest_output_share: NotRequired[float]
    commonest_output_id: NotRequired[int | str | None]
    copied_input_share: NotRequired[CopiedShare]


def data_report(
    inputs: Sequence[InputRow], outputs: Sequence[OutputRow], rows: Sequence[PairRow], task: Task
) -> DataReport:
    """Numbers of all that was made, and of given inputs beside it. Shares are 0..1, of kept rows.

    Texts are described by the made ones: of what is real nobody has to be warned.
    """
    made_for: dict[int | str, str | None] = {row["id"]: row["label"] for row in inputs}
    made = [row for row in rows if row["id"] in made_for]
    all_kept = [row for row in made if is_kept(row)]
    made_kept = [row for row in all_kept if source_of(row) == Source.MADE]
    kept = made_kept or all_kept
    texts = [row["input"] for row in kept]
    nearest, n_compared = nearest_rouge_l(texts)
    unanswered = {row["id"] for row in outputs if row["drop"]}
    report: DataReport = {
        "attempts": len(inputs),
        # A row counts for the label that it was made for, once it is annotated for its own.
        "dropped": {
            "generate": _drops([(row["drop"], row["label"]) for row in inputs], task.labels),
            "annotate": _drops([(row["drop"], made_for[row["id"]]) for row in outputs], task.labels),
            "curate": _drops(
                [(row["drop"], row["output"]) for row in made if row["id"] not in unanswered], task.labels
            ),
        },
        "kept": len(all_kept),
        "distinct_1": distinct_share(texts, 1),
        "distinct_2": distinct_share(texts, 2),
        "nearest_rouge_l": nearest,
        "nearest_rouge_l_rows": n_compared,
        "like_demonstrations": _like_examples(kept, task),
        "input_characters": {
            "made": spread(texts),
            "demonstrations": spread([example.input for example in task.examples]),
        },
        "output_characters": {
            "made": spread([row["output"] for row in kept]),
            "demonstrations": spread([example.output for example in task.examples]),
        },
    }
    if n_given := sum(source_of(row) == Source.GIVEN for row in inputs):
        report["given"] = n_given
        report["made_kept"] = len(made_kept)
    if task.shares:
        report["has_shares"] = True
    if task.is_classification:
        report["labels"] = {label: _label_counts(label, inputs, made, rows, task) for label in task.labels}
        return report
    answers = Counter(normalize(row["output"]) for row in kept)
    commonest, n_commonest = answers.most_common(1)[0] if answers else ("", 0)
    report["distinct_outputs"] = len(answers)
    report["commonest_output_share"] = _share(n_commonest, len(kept))
    report["commonest_output_id"] = next(
        (row["id"] for row in kept if normalize(row["output"]) == commonest), None
    )
    report["copied_input_share"] = {
        "made": _copied(Example(row["input"], row["output"]) for row in kept),
        "demonstrations": _copied(task.examples),
    }
    return report


def report_lines(report: DataReport, agreement: Agreement | None = None) -> list[str]:
    """The report as tables to read, with the agreement of labels and what inputs were made for, as curate found it."""
    lines = [*_funnel_lines(report), "", *_length_lines(report)]
    n_compared = report["nearest_rouge_l_rows"]
    n_described = report.get("made_kept") or report["kept"]
    drawn = f" (by {n_compared} of them)" if n_compared < n_described else ""
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


def _funnel_lines(report: DataReport) -> list[str]:
    """From the inputs that were asked for to the rows that are left, a line for each reason."""
    n_left = report["attempts"]
    n_given = report.get("given", 0)
    lines = [f"{n_left - n_given:>6} inputs were asked for"]
    if n_given:
        lines += [f"{n_given:>6} real ones were given"]
    for stage, what_is_left in (("generate", "inputs to answer"), ("annotate", "answers"), ("curate", "")):
        for reason, dropped in report["dropped"][stage].items():
            share = dropped["n"] / report["attempts"]
            line = f"{-dropped['n']:>6} {reason:<16} {share:>4.0%}  {_by_label(dropped['by_label'])}"
            lines.append(line.rstrip())
            n_left -= dropped["n"]
        if what_is_left and (stage == "generate" or report["dropped"][stage]):
            lines.append(f"{n_left:>6} {what_is_left}")
    return [*lines, f"{report['kept']:>6} {'rows' if n_given else 'made rows'} are left"]


def _length_lines(report: DataReport) -> list[str]:
    lines = [f"{'characters':<18}{'least':>7}{'1/4':>6}{'1/2':>6}{'3/4':>6}{'most':>6}   demonstrations"]
    for name, lengths in _telling_lengths(report).items():
        made, examples = lengths["made"], lengths["demonstrations"]
        cells = "".join(f"{value:>6}" for value in (made["min"], *made["quartiles"], made["max"]))
        lines.append(f"{name:<19}{cells}   {examples['min']} to {examples['max']}")
    return lines


def _telling_lengths(report: DataReport) -> dict[str, Lengths]:
    """The lengths that say something: those of labels do not."""
    inputs = {"input": report["input_characters"]}
    return inputs if "labels" in report else inputs | {"output": report["output_characters"]}


def _label_lines(labels: dict[str, LabelCounts]) -> list[str]:
    listed = list(labels.items())[:MAX_LABELS_IN_TABLE]
    width = max(len("label"), *(len(label) for label, _ in listed))
    lines = [f"{'label':<{width}}{'made for':>11}{'annotated':>11}{'kept':>11}{'shown':>11}   demonstrations"]
    for label, counts in listed:
        cells = (counts["made_for"], counts["annotated"], counts["kept"], counts["shown"])
        numbers = "".join(f"{cell:>11}" for cell in cells)
        lines.append(f"{label:<{width}}{numbers}   {counts['demonstrations']:>14}")
    if len(labels) > len(listed):
        lines.append(f"and {counted(len(labels) - len(listed), 'label')} more, in manifest.json")
    return lines


def _by_label(counts: dict[str, int]) -> str:
    """Counts by label in a line; of many labels the commonest."""
    listed = list(counts.items())
    more = []
    if len(listed) > MAX_LABELS_IN_A_LINE:
        listed = sorted(listed, key=lambda item: -item[1])[: MAX_LABELS_IN_A_LINE // 2]
        more = [f"{counted(len(counts) - len(listed), 'label')} more"]
    return ", ".join([*(f"{n} {label}" for label, n in listed), *more])


def warnings(report: DataReport, agreement: Agreement | None = None) -> list[str]:
    """What looks bad, and what helps; one line each. agreement: as in report_lines."""
    lines = []
    if agreement and agreement["p"] > MAX_P_OF_AGREEMENT:
        lines.append(
            f"the model hardly tells the labels apart (agreement could be chance, p = {agreement['p']:.2g}): training "
            "can take its bias away, and teaches it little else; a larger model helps most, then labels and an "
            "instruction that say more"
        )
    if report.get("made_kept", report["kept"]):
        lines += _input_warnings(report)
    if report.get("commonest_output_share", 0) > MAX_SHARE_OF_ONE_ANSWER:
        lines.append(
            f"one answer makes {report['commonest_output_share']:.0%} of the rows: look at one with "
            f"`sg-local explain RUN {report['commonest_output_id']}`, and say in the instruction what an answer is"
        )
    copied = report.get("copied_input_share", {"made": 0.0, "demonstrations": 0.0})
    if copied["made"] > MAX_SHARE_OF_COPIED_INPUTS and not copied["demonstrations"]:
        lines.append(
            f"{copied['made']:.0%} of the answers repeat their input: --form-filter drops them; else say in the "
            "instruction what is to be changed"
        )
    if report.get("made_kept", report["kept"]):
        lines += _length_warnings(report)
    labels = report.get("labels", {})
    rare = [] if report.get("has_shares") else _rare_label_warnings(labels)
    return lines + _longer_label_warnings(labels) + rare


def _input_warnings(report: DataReport) -> list[str]:
    """What looks bad about made inputs."""
    lines = []
    if report["nearest_rouge_l"] > MAX_NEAREST_ROUGE_L:
        lines.append(
            f"inputs resemble each other (ROUGE-L {report['nearest_rouge_l']:.2f} with the nearest): raise "
            "--input-temperature, or give demonstrations that differ more"
        )
    if report["like_demonstrations"]["input_share"] > MAX_LIKE_DEMONSTRATIONS:
        lines.append(
            f"{report['like_demonstrations']['input_share']:.0%} of the inputs resemble a demonstration: try another "
            "--input-prompt, or lower --near-duplicate-rouge-l"
        )
    return lines


def _length_warnings(report: DataReport) -> list[str]:
    """Which texts are mostly of other lengths than the examples'."""
    lines = []
    for name, lengths in _telling_lengths(report).items():
        examples, median = lengths["demonstrations"], lengths["made"]["quartiles"][1]
        least = min(examples["min"] / MAX_LENGTH_RATIO, examples["min"] - LENGTH_SLACK_CHARACTERS)
        most = max(examples["max"] * MAX_LENGTH_RATIO, examples["max"] + LENGTH_SLACK_CHARACTERS)
        if not least <= median <= most:
            lines.append(
                f"half of the {name}s have {median} characters or {'less' if median < least else 'more'}, the "
                f"demonstrations' {examples['min']} to {examples['max']}: --length-filter drops such rows; else give "
                "demonstrations of the lengths that you expect"
            )
    return lines


def _rare_label_warnings(labels: dict[str, LabelCounts]) -> list[str]:
    """Which labels have far fewer rows than others."""
    equal = sum(counts["kept"] for counts in labels.values()) / max(1, len(labels))
    rare = [label for label, counts in labels.items() if counts["kept"] < MIN_SHARE_OF_A_LABEL * equal]
    expected = f"{equal:.0f}" if equal >= 1 else "less than one for each"
    lines = [
        f"{labels[label]['kept']} made rows have the label {label!r}, equal numbers would be {expected}: give a "
        "demonstration of it, or a word that says more"
        for label in rare[:MAX_WARNED_LABELS]
    ]
    if len(rare) > MAX_WARNED_LABELS:
        more = len(rare) - MAX_WARNED_LABELS
        verb = "has" if more == 1 else "have"
        lines.append(f"{counted(more, 'label')} more {verb} as few rows: see manifest.json")
    return lines


def _longer_label_warnings(labels: dict[str, LabelCounts]) -> list[str]:
    """Which labels a model could tell by the length of the input alone."""
    shares = {
        label: counts["longer_share"]
        for label, counts in labels.items()
        if counts["longer_share"] is not None
    }
    unequal = [
        (label, "longer", share) if share > 0.5 else (label, "shorter", 1 - share)
        for label, share in shares.items()
        if max(share, 1 - share) > MAX_LONGER_SHARE
    ]
    if len(labels) == 2:  # what is longer than the one is shorter than the other
        unequal = unequal[:1]
    return [
        f"inputs of {label!r} are {how} than the others in {share:.0%} of the pairs, and the model "
        "may learn that: where real ones are not so, give demonstrations of equal lengths"
        for label, how, share in unequal[:MAX_WARNED_LABELS]
    ]


def _drops(reasons: Iterable[tuple[str | None, str | None]], labels: Sequence[str]) -> dict[str, Dropped]:
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
    label: str, inputs: Sequence[InputRow], made: Sequence[PairRow], rows: Sequence[PairRow], task: Task
) -> LabelCounts:
    of_label = [row for row in rows if row["output"] == label]
    unreal = [row for row in rows if source_of(row) in {Source.MADE, Source.DEMONSTRATION}]
    return {
        "made_for": sum(row["label"] == label for row in inputs if row["drop"] is None),
        "annotated": sum(row["output"] == label for row in made),
        "kept": sum(row["output"] == label for row in made if row["drop"] is None),
        "shown": sum(row["copies"] for row in of_label),
        "longer_share": _longer_share(
            [row for row in unreal if row["output"] == label],
            [row for row in unreal if row["output"] != label],
        ),
        "demonstrations": sum(example.output == label for example in task.examples),
    }


def _longer_share(rows: Sequence[PairRow], others: Sequence[PairRow]) -> float | None:
    """In which share of the pairs that are shown the input of the first is longer than that of the second.

    Equally long ones count half, so that 0.5 tells nothing (the area under the ROC curve). None where rows are too few.
    """
    lengths, other_lengths = (
        sorted(len(row["input"]) for row in some for _ in range(row["copies"])) for some in (rows, others)
    )
    if min(sum(row["copies"] > 0 for row in some) for some in (rows, others)) < MIN_ROWS_OF_A_LABEL:
        return None
    twice = sum(
        bisect_left(other_lengths, length) + bisect_right(other_lengths, length) for length in lengths
    )
    return round(twice / 2 / (len(lengths) * len(other_lengths)), 4)


def distinct_share(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams of words among all of the texts' (distinct-n)."""
    grams = [
        tuple(text_words[start : start + n])
        for text_words in map(words, texts)
        for start in range(len(text_words) - n + 1)
    ]
    return _share(len(set(grams)), len(grams))


def nearest_rouge_l(texts: Sequence[str]) -> tuple[float, int]:
    """Mean ROUGE-L with the nearest other text, and of how many texts it is the mean."""
    pool = [words(text) for text in texts]
    n_compared = min(len(pool), max(MIN_COMPARED, MAX_COMPARISONS // max(1, len(pool))))
    nearest = []
    for index in random.Random(0).sample(range(len(pool)), n_compared):
        one, best = pool[index], 0.0
        for place, other in enumerate(pool):
            # The LCS is at most the shorter of the two, which settles many pairs.
            if place != index and 2 * min(len(one), len(other)) > best * (len(one) + len(other)):
                best = max(best, _rouge_l(one, other))
        nearest.append(best)
    return round(statistics.fmean(nearest), 4) if nearest else 0.0, n_compared


def _like_examples(kept: Sequence[KeptPair], task: Task) -> Resemblance:
    """Shares of inputs, and of free answers, that have the words of an example in its order.

    An answer is compared with the examples' answers and inputs.
    """
    inputs = [words(example.input) for example in task.examples]
    alike = [_rouge_l(one, other) for one, other in combinations(inputs, 2)]
    bound = max([LIKE_ROUGE_L, *alike])

    def share(texts: Iterable[str], examples: Sequence[list[str]]) -> float:
        made = [words(text) for text in texts]
        n_alike = sum(any(_rouge_l(one, example) >= bound for example in examples) for one in made)
        return _share(n_alike, len(made))

    resemblance: Resemblance = {
        "from_rouge_l": round(bound, 4),
        "input_share": share((row["input"] for row in kept), inputs),
    }
    if not task.is_classification:
        outputs = [words(example.output) for example in task.examples]
        resemblance["output_share"] = share((row["output"] for row in kept), inputs + outputs)
    return resemblance


def _rouge_l(one: list[str], other: list[str]) -> float:
    """ROUGE-L F-measure of two lists of words."""
    total = len(one) + len(other)
    return 2 * LCSseq.similarity(one, other) / total if total else 0.0


def spread(texts: Sequence[str]) -> Spread:
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
