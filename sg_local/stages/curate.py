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
from sg_local.escape import one_line
from sg_local.files import row_seed, write_rows
from sg_local.progress import say
from sg_local.report.made_data import DataReport, data_report
from sg_local.report.made_data_lines import report_lines
from sg_local.report.made_data_warnings import warnings
from sg_local.report.review import review_lines
from sg_local.report.tables import counted
from sg_local.runs.directory import Run
from sg_local.runs.review import read_review, summary_of
from sg_local.runs.rows import known_labels, labelled_pairs, read_inputs, read_outputs
from sg_local.selfguide.filters import answer_fault, rules_of
from sg_local.selfguide.forecast import Forecast, forecast, forecast_line
from sg_local.selfguide.given import made_like_real
from sg_local.selfguide.labels import (
    Agreement,
    Known,
    Probabilities,
    agreement_by_chance,
    are_unequal,
    follows_labels,
    label_scores,
    margin,
    sharpened,
)
from sg_local.selfguide.metrics import normalize
from sg_local.selfguide.review import RowId, is_reviewable
from sg_local.selfguide.rows import (
    DEMONSTRATION,
    DropReason,
    InputRow,
    OutputRow,
    PairRow,
    ReviewRow,
    Source,
    Word,
    is_gold,
    is_kept,
    source_of,
)
from sg_local.selfguide.selection import (
    answer_confidences,
    balancing_copies,
    labelled_copies,
    most_confident,
    repeated_answers,
    same_share,
    source_to_leave_out,
    vote_margin,
)

HELD_OUT_SHARE = 0.15


class LabelFit(TypedDict, total=False):
    """How well labels fit what inputs were made for, as the manifest has it; empty where none was made for a label."""

    agreement: Agreement
    forecast: Forecast


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
        pairs, fit = _annotated_pairs(run, inputs, outputs)
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
        report = data_report(
            [row for row in inputs if source_of(row) != Source.LABELLED],
            [row for row in outputs if row["id"] not in {pair["id"] for pair in labelled}],
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


def _annotated_pairs(
    run: Run, inputs: Sequence[InputRow], all_outputs: Sequence[OutputRow]
) -> tuple[list[PairRow], LabelFit]:
    """The answered inputs with what is chosen and dropped, and how well they fit their made-for labels."""
    by_id = {row["id"]: row for row in inputs}
    outputs = [row for row in all_outputs if source_of(by_id[row["id"]]) != Source.LABELLED]
    pairs: list[PairRow] = [
        {
            "id": row["id"],
            "input": by_id[row["id"]]["input"],
            "output": row["output"],
            "confidence": None,
            "targets": None,
            "copies": 1,
            "drop": row["drop"],
            "source": source_of(by_id[row["id"]]),
        }
        for row in outputs
    ]
    same = made_like_real(inputs)
    for pair in pairs:
        if pair["drop"] is None and pair["id"] in same:
            pair["drop"] = DropReason.DUPLICATE
    fit: LabelFit = {}
    if run.task.is_classification:
        known = known_labels(run, inputs, all_outputs, [pair["id"] for pair in pairs if pair["drop"] is None])
        fit = _choose_labels(run, pairs, outputs, [by_id[row["id"]]["label"] for row in outputs], known)
    else:
        _choose_answers(run, pairs, outputs)
    return pairs, fit


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


def _choose_labels(
    run: Run,
    pairs: Sequence[PairRow],
    outputs: Sequence[OutputRow],
    made_for: Sequence[str | None],
    known: Known,
) -> LabelFit:
    """Labels by their scores or votes; drops what disagrees or is unsure. Returns how well made-for labels fit."""
    settings, n_labels = run.settings, len(run.task.labels)
    if settings.label_answers == "samples":
        _choose_voted_labels(run, pairs, outputs)
    answered = [
        (pair, output, label)
        for pair, output, label in zip(pairs, outputs, made_for, strict=True)
        if pair["drop"] is None
    ]
    if not answered:
        return {}
    reliability, foreseen, kappa = 1 / n_labels, None, None
    if settings.label_answers == "scores":
        scores = label_scores(
            [output["label_logprobs"] for _, output, _ in answered],
            [label for _, _, label in answered],
            run.task.labels,
            removes_bias=settings.calibrate,
            weighs_evidence=settings.agreement == "evidence",
            known=known,
        )
        _take_likeliest(run, [pair for pair, _, _ in answered], scores.last)
        agreed, reliability, kappa = scores.agreed, scores.reliability, scores.real_kappa
        foreseen = _forecast(run, answered, scores.before_evidence)
    else:
        agreed = sum(pair["output"] == label for pair, _, label in answered)
    _say_unequal_labels(run, pairs)
    n_made_for = sum(label is not None for _, _, label in answered)
    follows = follows_labels(agreed, n_made_for, n_labels)
    used_as_filter = settings.agreement == "always" or (settings.agreement == "auto" and follows)
    if used_as_filter:
        for pair, _, label in answered:
            if label is not None and pair["output"] != label:
                pair["drop"] = DropReason.DISAGREEMENT
    agreement_p = agreement_by_chance(agreed, n_made_for, n_labels) if n_made_for else 1.0
    _leave_out_a_source(run, pairs, agreement_p, kappa)
    _drop_least_confident(run, pairs, by_label=True)
    if n_made_for == 0:
        return {}
    fit: LabelFit = {
        "agreement": {
            "share": round(agreed / n_made_for, 4),
            "n_rows": n_made_for,
            "chance": round(1 / n_labels, 4),
            "p": float(f"{agreement_p:.3g}"),
            "reliability": round(reliability, 4),
            "used_as_filter": used_as_filter,
        }
    }
    if foreseen:
        fit["forecast"] = foreseen
    return fit


def _leave_out_a_source(run: Run, pairs: Sequence[PairRow], agreement_p: float, kappa: float | None) -> None:
    """Drops real rows, or made ones, where the student cannot tell their labels and the others are enough."""
    counts = Counter(source_of(pair) for pair in pairs if is_kept(pair))
    source = source_to_leave_out(
        counts[Source.MADE], counts[Source.GIVEN], run.settings.n_inputs, agreement_p, kappa
    )
    if source is None or run.settings.agreement == "never":
        return
    reason = DropReason.PROMPTS_DIFFER if source == Source.GIVEN else DropReason.BY_CHANCE
    for pair in pairs:
        if is_kept(pair) and source_of(pair) == source:
            pair["drop"] = reason
    if source == Source.GIVEN:
        say(
            f"curate: the prompts that score labels hardly agree on real inputs (kappa {kappa:.2f}), so their labels "
            "would be chance and they are left out; rows that you label, or answer in `sg-local review`, count"
        )
    else:
        say(
            f"curate: made inputs fit what they were made for as by chance (p = {agreement_p:.2g}), so they are left "
            "out, and real ones alone are trained on"
        )


def _forecast(
    run: Run, answered: Sequence[tuple[PairRow, OutputRow, str | None]], scores: Probabilities
) -> Forecast | None:
    """What the chosen labels and the base's few-shot answers foresee; scores: of the labels, before evidence."""
    # The first prompt is that of few-shot prompting (prompts.py).
    first = [output["label_logprobs"][0] for _, output, _ in answered]
    return forecast(
        [max(prompt, key=lambda label: prompt[label]) for prompt in first],
        [run.task.labels[row.index(max(row))] for row in scores],
        [label for _, _, label in answered],
    )


def _take_likeliest(run: Run, pairs: Sequence[PairRow], probabilities: Probabilities) -> None:
    """Gives each pair its likeliest label, the margin as confidence, and the targets that are asked for."""
    labels = run.task.labels
    for pair, row in zip(pairs, probabilities, strict=True):
        pair["output"] = labels[row.index(max(row))]
        pair["confidence"] = round(margin(row), 4)
        if run.settings.label_targets == "soft":
            shares = sharpened(row, run.settings.soft_temperature)
            pair["targets"] = {label: round(share, 4) for label, share in zip(labels, shares, strict=True)}


def _choose_voted_labels(run: Run, pairs: Sequence[PairRow], outputs: Sequence[OutputRow]) -> None:
    """Labels as the samples voted; drops what is no label, or was not agreed on."""
    labels = {normalize(label): label for label in run.task.labels}
    for pair, output in zip(pairs, outputs, strict=True):
        if pair["drop"] is not None or pair["output"] is None:
            continue
        label = labels.get(normalize(pair["output"]))
        pair["confidence"] = round(vote_margin(output["samples"]), 4)
        if label is None:
            pair["drop"] = DropReason.NO_LABEL
            continue
        pair["output"] = label
        if output["share"] < run.settings.min_share:
            pair["drop"] = DropReason.LOW_SHARE


def _choose_answers(run: Run, pairs: Sequence[PairRow], outputs: Sequence[OutputRow]) -> None:
    """Drops answers that are noise, of another form than the examples', not agreed on, or unsure."""
    settings, rules = run.settings, rules_of(run.task)
    answered = [
        (pair, output)
        for pair, output in zip(pairs, outputs, strict=True)
        if pair["drop"] is None and pair["output"] is not None
    ]
    if settings.choose_by == "information":
        texts = [pair["input"] for pair, _ in answered]
        said = repeated_answers(settings, rules, texts, [output for _, output in answered])
        for (pair, _), answer in zip(answered, said or (), strict=bool(said)):
            pair["output"] = answer
    confidences = answer_confidences(
        [{**output, "output": pair["output"]} for pair, output in answered], settings.choose_by
    )
    for (pair, output), confidence in zip(answered, confidences, strict=True):
        pair["confidence"] = round(confidence, 4)
        pair["drop"] = answer_fault(settings, rules, pair["input"], str(pair["output"]))
        # Samples of a high temperature agree little, and the choice by information does not rest on it.
        by_agreement = settings.choose_by != "information"
        if pair["drop"] is None and by_agreement and output["share"] < settings.min_share:
            pair["drop"] = DropReason.LOW_SHARE
    _drop_least_confident(run, pairs, by_label=False)


def _drop_least_confident(run: Run, pairs: Sequence[PairRow], *, by_label: bool) -> None:
    """Keeps the share keep_confident of the rows that are not dropped, of each label where there are labels.

    Real and made rows are taken apart: the confidence of one says nothing beside that of the other.
    """
    shares = dict.fromkeys(Source, run.settings.keep_confident)
    if by_label:
        shares[Source.GIVEN] = run.settings.keep_confident_real
    for source, share in shares.items():
        kept = [pair for pair in pairs if is_kept(pair) and source_of(pair) == source]
        is_confident = most_confident(
            [str(pair["output"]) if by_label else "" for pair in kept],
            [pair["confidence"] for pair in kept],
            share,
        )
        for pair, stays in zip(kept, is_confident, strict=True):
            if not stays:
                pair["drop"] = DropReason.LOW_CONFIDENCE


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


def _say_unequal_labels(run: Run, pairs: Sequence[PairRow]) -> None:
    """Says it where real inputs speak clearly against labels that are equally frequent."""
    answers = [pair["output"] for pair in pairs if is_kept(pair) and source_of(pair) == Source.GIVEN]
    if run.task.shares or not are_unequal(answers, run.task.labels):
        return
    counts = ", ".join(f"{one_line(label)} {count}" for label, count in Counter(answers).most_common(5))
    say(
        f"curate: real inputs were annotated unequally ({counts}), and labels are taken to occur equally often: where "
        "they do not, write `shares` into the task"
    )


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
