"""Stage 3: choose the pairs to train on, and give every label equal numbers (SELF-GUIDE, section 3.3).

reads  inputs.jsonl outputs.jsonl, and looks whether there is a test.jsonl
writes train.jsonl
    {"id": 7, "input": "My parcel is late.", "output": "delivery", "confidence": 0.81, "targets": null,
     "copies": 2, "drop": null}
    with soft targets      "targets": {"delivery": 0.97, "refund": 0.03}

The demonstrations are the first rows: the only gold data there is. A dropped row keeps its place and its reason.
Where the task has no test file, a part of the made pairs is held out for scoring ("held_out").
"""

import math
from collections import Counter
from typing import Any

from sg_local.errors import SgLocalError
from sg_local.files import read_rows, row_seed, write_rows
from sg_local.progress import say
from sg_local.report.made_data import data_report, report_lines, warnings
from sg_local.run.directory import Run
from sg_local.selfguide.filters import answer_fault, rules_of
from sg_local.selfguide.metrics import normalize
from sg_local.selfguide.rows import DEMONSTRATION
from sg_local.selfguide.selection import (
    agreement_by_chance,
    balancing_copies,
    calibrate,
    ensemble,
    follows_labels,
    label_probabilities,
    margin,
    most_confident,
    reliability,
    sharpened,
    tempered,
    vote_margin,
    with_evidence,
)

HELD_OUT_SHARE = 0.15


def run_curate(run: Run) -> None:
    """Writes train.jsonl, and tells what the made data is like and what was dropped and why."""
    with run.stage("curate") as details:
        made = {row["id"]: row for row in read_rows(run.file("inputs.jsonl"))}
        outputs = read_rows(run.file("outputs.jsonl"))
        rows = [
            {
                "id": row["id"],
                "input": made[row["id"]]["input"],
                "output": row["output"],
                "confidence": None,
                "targets": None,
                "copies": 1,
                "drop": row["drop"],
            }
            for row in outputs
        ]
        if run.task.is_classification:
            details["agreement"] = _choose_labels(run, rows, outputs, made)
        else:
            _choose_answers(run, rows, outputs)
        if not run.file("test.jsonl").exists():
            kept = [row for row in rows if row["drop"] is None]
            kept.sort(key=lambda row: row_seed(run.settings.seed, "held_out", row["id"]))
            for row in kept[: math.ceil(len(kept) * HELD_OUT_SHARE)]:
                row["drop"] = "held_out"
        gold = [
            {
                "id": f"{DEMONSTRATION}{number}",
                "input": example.input,
                "output": example.output,
                "confidence": 1.0,
                "targets": None,
                "copies": 1,
                "drop": None,
            }
            for number, example in enumerate(run.task.examples, 1)
        ]
        rows = gold + rows
        if run.task.is_classification:
            _balance(run, rows)
        for row in rows:
            if row["drop"]:
                row["copies"] = 0
        if run.settings.train_rows == "demonstrations":
            _train_on_demonstrations(rows, len(gold))
        write_rows(run.file("train.jsonl"), rows)
        details["counts"] = _counts(rows)
        details["report"] = data_report(list(made.values()), outputs, rows, run.task)
        _tell(details["counts"], details["report"], details.get("agreement"))
        if details["counts"]["kept"] <= len(gold):
            raise SgLocalError(
                f"no made pair passed the filters ({details['counts']['dropped']}): "
                f"look at {run.file('train.jsonl')}; a clearer instruction or other examples help most"
            )


def _choose_labels(
    run: Run, rows: list[dict[str, Any]], outputs: list[dict[str, Any]], made: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Labels by their scores or votes; drops what disagrees or is unsure. Returns how well labels were followed."""
    settings, labels = run.settings, run.task.labels
    by_scores = settings.label_answers == "scores"
    if not by_scores:
        _choose_voted_labels(run, rows, outputs)
    scored = [index for index, row in enumerate(rows) if row["drop"] is None]
    if not scored:
        return {}
    asked = [made[rows[index]["id"]]["label"] for index in scored]
    probabilities: list[list[float]] = []
    if by_scores:
        probabilities = _label_probabilities(run, [outputs[index] for index in scored])
        _take_likeliest(run, [rows[index] for index in scored], probabilities)
    agreed = sum(rows[index]["output"] == label for index, label in zip(scored, asked, strict=True))
    chance = reliable = 1 / len(labels)
    if by_scores and settings.agreement == "evidence":
        reliable = reliability(agreed, len(scored), len(labels))
    if reliable > chance:
        probabilities = [
            with_evidence(own, labels.index(label), reliable)
            for own, label in zip(tempered(probabilities, reliable), asked, strict=True)
        ]
        _take_likeliest(run, [rows[index] for index in scored], probabilities)
    follows = follows_labels(agreed, len(scored), len(labels))
    used = settings.agreement == "always" or (settings.agreement == "auto" and follows)
    if used:
        for index, label in zip(scored, asked, strict=True):
            if rows[index]["output"] != label:
                rows[index]["drop"] = "disagreement"
    left = [index for index in scored if rows[index]["drop"] is None]
    keep = most_confident(
        [rows[index]["output"] for index in left],
        [rows[index]["confidence"] for index in left],
        settings.keep_confident,
    )
    for index, kept in zip(left, keep, strict=True):
        if not kept:
            rows[index]["drop"] = "low_confidence"
    return {
        "share": round(agreed / len(scored), 4),
        "n_rows": len(scored),
        "chance": round(chance, 4),
        "p": float(f"{agreement_by_chance(agreed, len(scored), len(labels)):.3g}"),
        "reliability": round(reliable, 4),
        "used_as_filter": used,
    }


def _label_probabilities(run: Run, outputs: list[dict[str, Any]]) -> list[list[float]]:
    """Each row's label probabilities over all its prompts, each prompt's own bias taken out first."""
    by_prompt = []
    for number in range(len(outputs[0]["label_logprobs"])):
        scores = [[row["label_logprobs"][number][label] for label in run.task.labels] for row in outputs]
        by_prompt.append(
            calibrate(scores) if run.settings.calibrate else [label_probabilities(row) for row in scores]
        )
    return [ensemble(parts) for parts in zip(*by_prompt, strict=True)]


def _take_likeliest(run: Run, rows: list[dict[str, Any]], probabilities: list[list[float]]) -> None:
    """Gives each row its likeliest label, the margin as confidence, and the targets that are asked for."""
    labels = run.task.labels
    for row, own in zip(rows, probabilities, strict=True):
        row["output"] = labels[own.index(max(own))]
        row["confidence"] = round(margin(own), 4)
        if run.settings.label_targets == "soft":
            shares = sharpened(own, run.settings.soft_temperature)
            row["targets"] = {label: round(share, 4) for label, share in zip(labels, shares, strict=True)}


def _choose_voted_labels(run: Run, rows: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    """Labels as the samples voted; drops what is no label, or was not agreed on."""
    labels = {normalize(label): label for label in run.task.labels}
    for row, output in zip(rows, outputs, strict=True):
        if row["drop"] is not None:
            continue
        row["output"] = labels.get(normalize(output["output"]), output["output"])
        row["confidence"] = round(vote_margin(output["samples"]), 4)
        if row["output"] not in labels.values():
            row["drop"] = "no_label"
        elif output["share"] < run.settings.min_share:
            row["drop"] = "low_share"


def _choose_answers(run: Run, rows: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    """Drops answers that are noise, of another form than the demonstrations', not agreed on, or unsure."""
    settings, rules = run.settings, rules_of(run.task)
    for row, output in zip(rows, outputs, strict=True):
        if row["drop"] is not None:
            continue
        row["confidence"] = round(_answer_confidence(output, settings.choose_by), 4)
        row["drop"] = answer_fault(settings, rules, row["input"], row["output"])
        # Samples of a high temperature agree little, and the choice by information does not rest on it.
        by_agreement = settings.choose_by != "information"
        if row["drop"] is None and by_agreement and output["share"] < settings.min_share:
            row["drop"] = "low_share"
    left = [row for row in rows if row["drop"] is None]
    confidences = [row["confidence"] for row in left]
    keep = most_confident([""] * len(left), confidences, settings.keep_confident)
    for row, is_kept in zip(left, keep, strict=True):
        if not is_kept:
            row["drop"] = "low_confidence"


def _answer_confidence(output: dict[str, Any], choose_by: str) -> float:
    """Of a free answer, by the measure that it was chosen by."""
    if choose_by == "votes":
        return vote_margin(output["samples"])
    return float(output["information"] if choose_by == "information" else output["share"])


def _balance(run: Run, rows: list[dict[str, Any]]) -> None:
    """Equal numbers for each label that occurs, by repeating rows, the most confident ones first."""
    left = [row for row in rows if row["drop"] is None]
    left.sort(key=lambda row: -row["confidence"])  # stable: ties keep the order of the file
    copies = balancing_copies([row["output"] for row in left], run.settings.max_copies)
    for row, count in zip(left, copies, strict=True):
        row["copies"] = count
        if count == 0:
            row["drop"] = "balance"


def _train_on_demonstrations(rows: list[dict[str, Any]], n_demonstrations: int) -> None:
    """Gives the copies of all rows to the demonstrations, which come first: the same number of steps."""
    copies = sum(row["copies"] for row in rows)
    for index, row in enumerate(rows):
        row["copies"] = len(range(index, copies, n_demonstrations)) if index < n_demonstrations else 0


def _counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [row for row in rows if row["drop"] is None]
    outputs = Counter(row["output"] for row in kept)
    counts = {
        "rows": len(rows),
        "kept": len(kept),
        "copies": sum(row["copies"] for row in kept),
        "dropped": dict(sorted(Counter(row["drop"] for row in rows if row["drop"]).items())),
    }
    if len(outputs) <= 20:
        counts["kept_by_output"] = dict(sorted(outputs.items()))
    return counts


def _tell(counts: dict[str, Any], report: dict[str, Any], agreement: dict[str, Any] | None) -> None:
    """The table of what was made and dropped, and what in it looks bad."""
    for line in report_lines(report, agreement):
        say(f"  {line}".rstrip())
    say(f"curate: {counts['kept']} rows with the demonstrations, {counts['copies']} with repetitions")
    for warning in warnings(report, agreement):
        say(f"curate: {warning}")
