"""Stage 3: choose the pairs to train on, and give every label equal numbers (SELF-GUIDE, section 3.3).

reads  inputs.jsonl outputs.jsonl, labelled.jsonl and review.jsonl where they are, and looks whether there is a
       test.jsonl
writes train.jsonl   PairRow of selfguide/rows.py
    {"id": 7, "input": "My parcel is late.", "output": "delivery", "confidence": 0.81, "targets": null,
     "copies": 2, "drop": null, "source": "made"}
    with soft targets      "targets": {"delivery": 0.97, "refund": 0.03}

The examples of the task are the first rows, and after them those that were labelled: gold data, of which a labelled row
is shown more often than a made one. So is a row that a person reviewed ("reviewed": true), with that person's output,
however unsure the model was. A dropped row keeps its place and its reason. Where the task has no test file, a part of
the labelled rows is held out for scoring ("held_out"); where these are too few, a part of the others.

A review changes no other row: its rows were chosen as unsure ones, and no bias of the batch can be learned from these.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from sg_local.errors import SgLocalError
from sg_local.files import row_seed, write_rows
from sg_local.progress import say
from sg_local.report.made_data import DataReport, data_report
from sg_local.report.made_data_lines import report_lines
from sg_local.report.made_data_warnings import warnings
from sg_local.report.review import review_lines
from sg_local.report.tables import counted
from sg_local.runs.directory import Run
from sg_local.runs.review import read_review, summary_of
from sg_local.runs.rows import labelled_pairs, read_inputs, read_outputs
from sg_local.selfguide.forecast import forecast_line
from sg_local.selfguide.review import RowId, is_reviewable
from sg_local.selfguide.rows import (
    DEMONSTRATION,
    DropReason,
    OutputRow,
    PairRow,
    ReviewRow,
    Source,
    Word,
    is_gold,
    is_kept,
    source_of,
)
from sg_local.selfguide.selection import balancing_copies, labelled_copies, same_share
from sg_local.stages.choosing import LabelFit, choose_pairs

HELD_OUT_SHARE = 0.15


class Counts(TypedDict):
    """How many rows train.jsonl has, as the manifest has it.

    {"rows": 201, "kept": 161, "copies": 172, "dropped": {"low_confidence": 40}, "kept_by_output": {"delivery": 43}}
    """

    rows: int
    kept: int
    copies: int
    dropped: dict[str, int]
    kept_by_output: NotRequired[dict[str, int]]  # of at most 20 outputs


def run_curate(run: Run) -> None:
    """Writes train.jsonl, and tells what the made data is like and what was dropped and why."""
    with run.stage("curate") as details:
        inputs = read_inputs(run)
        outputs = read_outputs(run, inputs)
        labelled = labelled_pairs(run, inputs)
        pairs, fit = choose_pairs(run, inputs, outputs)
        words = read_review(run, inputs)
        if words:
            details["review"] = summary_of(run, words, pairs)
            _take_words(pairs, words)
        has_scored_rows = run.file("test.jsonl").exists() or any(
            pair["drop"] == DropReason.HELD_OUT for pair in labelled
        )
        if not has_scored_rows:
            _hold_out(run, pairs)
            if not run.task.is_classification:
                details["held_out_same_share"] = _held_out_same_share(pairs, outputs)
        examples = _example_pairs(run)
        rows = examples + labelled + pairs
        _set_copies(run, rows)
        for row in rows:
            if row["drop"]:
                row["copies"] = 0
        if run.settings.train_rows == "demonstrations":
            _train_on_examples(rows, len(examples))
        write_rows(run.file("train.jsonl"), rows)
        counts = _counts(rows)
        labelled_ids = {pair["id"] for pair in labelled}
        report = data_report(
            [row for row in inputs if source_of(row) != Source.LABELLED],
            [row for row in outputs if row["id"] not in labelled_ids],
            rows,
            run.task,
        )
        details |= {**fit, "counts": counts, "report": report}
        _say_results(counts, report, fit)
        _say_real(rows)
        if "review" in details:
            for line in review_lines(details["review"]):
                say(f"curate: {line}")
        if counts["kept"] <= len(examples):
            raise SgLocalError(
                f"no pair passed the filters ({counts['dropped']}): "
                f"look at {run.file('train.jsonl')}; a clearer instruction or other examples help most"
            )


def _take_words(pairs: Sequence[PairRow], words: Mapping[RowId, ReviewRow]) -> None:
    """Gives reviewed rows what a person said, in place of what was chosen."""
    for pair in pairs:
        said = words.get(pair["id"]) if is_reviewable(pair) else None
        if said is None:
            continue
        if said["word"] == Word.DROP:
            pair["drop"] = DropReason.REVIEW
            continue
        pair["output"], pair["confidence"], pair["targets"] = said["output"], 1.0, None
        pair["drop"], pair["reviewed"] = None, True


def _hold_out(run: Run, pairs: Sequence[PairRow]) -> None:
    """Drops a part of the annotated pairs, to be scored on; never what a person gave an answer to."""
    kept = [pair for pair in pairs if pair["drop"] is None and not is_gold(pair)]
    kept.sort(key=lambda pair: row_seed(run.settings.seed, "held_out", pair["id"]))
    for pair in kept[: math.ceil(len(kept) * HELD_OUT_SHARE)]:
        pair["drop"] = DropReason.HELD_OUT


def _held_out_same_share(pairs: Sequence[PairRow], outputs: Sequence[OutputRow]) -> float | None:
    """How many of a held-out row's samples say what it takes as right, 0..1 on average; None where none is held out."""
    samples = {row["id"]: row["samples"] for row in outputs if row.get("samples")}
    shares = [
        same_share(pair["output"] or "", samples[pair["id"]])
        for pair in pairs
        if pair["drop"] == DropReason.HELD_OUT and pair["id"] in samples
    ]
    return round(statistics.fmean(shares), 4) if shares else None


def _example_pairs(run: Run) -> list[PairRow]:
    return [
        {
            "id": f"{DEMONSTRATION}{number}",
            "input": example.input,
            "output": example.output,
            "confidence": 1.0,
            "targets": None,
            "copies": 1,
            "drop": None,
            "source": Source.DEMONSTRATION,
        }
        for number, example in enumerate(run.task.examples, 1)
    ]


def _set_copies(run: Run, rows: Sequence[PairRow]) -> None:
    """How often each row is shown: gold ones more often; labels as often as their shares, or equally often.

    Of a label real and reviewed rows come first, and of these the most confident ones.
    """
    kept = [row for row in rows if is_kept(row)]
    n_gold = sum(map(is_gold, kept))
    weight = labelled_copies(n_gold, len(kept) - n_gold, run.settings.max_copies)
    # Stable: ties keep the order of the file.
    kept.sort(key=lambda row: (source_of(row) == Source.MADE and not is_gold(row), -row["confidence"]))
    shown = [row for row in kept for _ in range(weight if is_gold(row) else 1)]
    copies = [1] * len(shown)
    if run.task.is_classification:
        shares = dict(zip(run.task.labels, run.task.shares, strict=False))
        copies = balancing_copies([row["output"] for row in shown], run.settings.max_copies, shares)
    for row in kept:
        row["copies"] = 0
    for row, count in zip(shown, copies, strict=True):
        row["copies"] += count
    for row in kept:
        if row["copies"] == 0:
            row["drop"] = DropReason.BALANCE


def _train_on_examples(rows: Sequence[PairRow], n_examples: int) -> None:
    """Gives the copies of all rows to the examples, which come first: the same number of steps."""
    copies = sum(row["copies"] for row in rows)
    for index, row in enumerate(rows):
        row["copies"] = len(range(index, copies, n_examples)) if index < n_examples else 0


def _counts(rows: Sequence[PairRow]) -> Counts:
    kept = [row for row in rows if is_kept(row)]
    outputs = Counter(row["output"] for row in kept)
    counts: Counts = {
        "rows": len(rows),
        "kept": len(kept),
        "copies": sum(row["copies"] for row in kept),
        "dropped": dict(sorted(Counter(str(row["drop"]) for row in rows if row["drop"]).items())),
    }
    if len(outputs) <= 20:
        counts["kept_by_output"] = dict(sorted(outputs.items()))
    return counts


def _say_real(rows: Sequence[PairRow]) -> None:
    """What of the training rows is real."""
    kept = Counter(source_of(row) for row in rows if is_kept(row))
    copies = {row["copies"] for row in rows if is_kept(row) and source_of(row) == Source.LABELLED}
    if kept[Source.GIVEN]:
        say(
            f"curate: of the rows that are left {kept[Source.GIVEN]} have real inputs, {kept[Source.MADE]} made ones"
        )
    if kept[Source.LABELLED]:
        n_held_out = sum(
            row["drop"] == DropReason.HELD_OUT and source_of(row) == Source.LABELLED for row in rows
        )
        say(
            f"curate: {kept[Source.LABELLED]} labelled rows are trained on, {min(copies)} to {max(copies)} times each; "
            f"{n_held_out} are held out"
        )


def _say_results(counts: Counts, report: DataReport, fit: LabelFit) -> None:
    """The table of what was made and dropped, what it foresees, and what in it looks bad."""
    for line in report_lines(report, fit.get("agreement")):
        say(f"  {line}".rstrip())
    if "forecast" in fit:
        say(f"curate: {forecast_line(fit['forecast'])}")
    rows = counted(counts["kept"], "row")
    say(f"curate: {rows} with the demonstrations, {counts['copies']} with repetitions")
    for warning in warnings(report, fit.get("agreement")):
        say(f"curate: {warning}")
