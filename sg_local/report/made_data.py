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

The funnel of drops, labels, lengths and likeness; `made_data_lines.py` tells it as tables, `made_data_warnings.py`
what of it looks bad. Variety and its sources: `variety.py`.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NotRequired, TypedDict

from sg_local.report.variety import Spread, distinct_share, nearest_rouge_l, rouge_l, share_of, spread
from sg_local.selfguide.metrics import normalize, words
from sg_local.selfguide.rows import InputRow, KeptPair, OutputRow, PairRow, Source, is_kept, source_of
from sg_local.task import Example, Task

LIKE_ROUGE_L = 0.5  # or as much as two demonstrations are alike: then it is the task's form
MIN_ROWS_OF_A_LABEL = 10  # before its lengths are compared with the others'


class Dropped(TypedDict):
    """How many rows one reason dropped."""

    n: int
    by_label: dict[str, int]


class Resemblance(TypedDict):
    """Which share has the words of an example of the task in its order."""

    from_rouge_l: float
    input_share: float
    output_share: NotRequired[float]  # of free answers


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
    report["commonest_output_share"] = share_of(n_commonest, len(kept))
    report["commonest_output_id"] = next(
        (row["id"] for row in kept if normalize(row["output"]) == commonest), None
    )
    report["copied_input_share"] = {
        "made": _copied(Example(row["input"], row["output"]) for row in kept),
        "demonstrations": _copied(task.examples),
    }
    return report


def telling_lengths(report: DataReport) -> dict[str, Lengths]:
    """The lengths that say something: those of labels do not."""
    inputs = {"input": report["input_characters"]}
    return inputs if "labels" in report else inputs | {"output": report["output_characters"]}


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


def _like_examples(kept: Sequence[KeptPair], task: Task) -> Resemblance:
    """Shares of inputs, and of free answers, that have the words of an example in its order.

    An answer is compared with the examples' answers and inputs.
    """
    inputs = [words(example.input) for example in task.examples]
    alike = [rouge_l(one, other) for one, other in combinations(inputs, 2)]
    bound = max([LIKE_ROUGE_L, *alike])

    def share(texts: Iterable[str], examples: Sequence[list[str]]) -> float:
        made = [words(text) for text in texts]
        n_alike = sum(any(rouge_l(one, example) >= bound for example in examples) for one in made)
        return share_of(n_alike, len(made))

    resemblance: Resemblance = {
        "from_rouge_l": round(bound, 4),
        "input_share": share((row["input"] for row in kept), inputs),
    }
    if not task.is_classification:
        outputs = [words(example.output) for example in task.examples]
        resemblance["output_share"] = share((row["output"] for row in kept), inputs + outputs)
    return resemblance


def _copied(pairs: Iterable[Example]) -> float:
    """Share of pairs whose output is their input."""
    same = [normalize(pair.output) == normalize(pair.input) for pair in pairs]
    return share_of(sum(same), len(same))
