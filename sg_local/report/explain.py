"""A row's life: what it was made for, what the base answered, and what became of it.

    explain(run, "7")
    -> {"id": "7", "demonstration": null,
        "made": {"input": "My parcel is late.", "label": "delivery", "prompt": "turns", "drop": null, "seed": 90417},
        "annotated": {"label_logprobs": [{"delivery": -0.4, "refund": -2.1}], "output": "delivery", "drop": null},
        "reviewed": {"word": "answer", "output": "refund", "model_output": "delivery", ...},
        "label_scores": {"delivery": {"raw": 0.85, "calibrated": 0.72, "with_evidence": 0.93}, ...},
        "curated": {"output": "delivery", "confidence": 0.86, "copies": 2, "drop": null},
        "as_made_for": true, "reason": null, "curate_is_finished": true, "in_training": true}

Reads inputs.jsonl, outputs.jsonl, review.jsonl and train.jsonl, as far as they are there, also while a stage or a
review is at work on one.
Changes nothing, and takes no lock.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from sg_local.errors import InputError
from sg_local.escape import json_text, one_line
from sg_local.files import Row, read_rows
from sg_local.report.tables import counted
from sg_local.runs.directory import Run
from sg_local.runs.review import read_review
from sg_local.runs.rows import known_labels
from sg_local.selfguide.given import made_like_real
from sg_local.selfguide.labels import label_scores
from sg_local.selfguide.rows import (
    DEMONSTRATION,
    DropReason,
    InputRow,
    OutputRow,
    PairRow,
    ReviewRow,
    Source,
    source_of,
)
from sg_local.settings import as_flag

MAX_SHOWN_CHARACTERS = 2000  # of one text
MAX_SHOWN_LABELS = 20
MAX_SHOWN_SAMPLES = 20

_NOT_SHOWN = {"id", "made_from", "input_sha256"}
_STAGES = ("made", "annotated", "reviewed", "curated")  # keys of Explanation, in the order of a row's life


class Scores(TypedDict):
    """How probable one label is as the answer; None where that is not known yet, or not computed."""

    raw: float
    calibrated: float | None
    with_evidence: float | None


class Explanation(TypedDict):
    """What each stage wrote about a row (None for one that has not seen it), and what follows from it."""

    id: str
    demonstration: Mapping[str, object] | None
    made: Mapping[str, object] | None
    annotated: Mapping[str, object] | None
    reviewed: Mapping[str, object] | None  # a person's word that is in force
    curated: Mapping[str, object] | None
    label_scores: dict[str, Scores] | None
    as_made_for: bool | None
    reason: str | None
    curate_is_finished: bool
    in_training: bool


def explain(run: Run, row_id: str) -> Explanation:
    """The life of a row. Raises InputError for an unknown id."""
    inputs = _rows(run, "inputs.jsonl", InputRow)
    outputs = _rows(run, "outputs.jsonl", OutputRow)
    made = _row(inputs, row_id)
    annotated = _row(outputs, row_id)
    curated = _row(_rows(run, "train.jsonl", PairRow), row_id)
    examples = {f"{DEMONSTRATION}{number}": one.as_row() for number, one in enumerate(run.task.examples, 1)}
    if not (made or annotated or curated or row_id in examples):
        raise InputError(f"{run.path} has no row {row_id!r:.80}: {_known_ids(inputs, list(examples))}")
    is_finished = run.is_finished("curate")
    answers = [row["output"] for row in (curated, annotated) if row]
    answer = next((answer for answer in answers if answer is not None), None)
    label = made["label"] if made else None
    drops = [row["drop"] for row in (curated, annotated, made) if row]
    drop = next(filter(None, drops), None)
    return {
        "id": row_id,
        "demonstration": examples.get(row_id),
        "made": _without_id(made),
        "annotated": _without_id(annotated),
        "reviewed": _without_id(_said(run, row_id, inputs)),
        "curated": _without_id(curated),
        "label_scores": _label_scores(run, row_id, inputs, outputs, is_finished),
        "as_made_for": None if label is None or answer is None else answer == label,
        "reason": _reason(run, drop) if drop else None,
        "curate_is_finished": is_finished,
        "in_training": bool(is_finished and curated and curated["drop"] is None and curated["copies"]),
    }


def explained(explanation: Explanation) -> str:
    """The same as lines to read."""
    lines = [f"row {explanation['id']}"]
    parts = {
        "demonstration": explanation["demonstration"],
        "made": explanation["made"],
        "annotated": explanation["annotated"],
        "reviewed": explanation["reviewed"],
        "curated": explanation["curated"],
    }
    for name in ["demonstration", "curated"] if explanation["demonstration"] else _STAGES:
        fields = parts[name]
        if fields is None:
            lines += [] if name == "reviewed" else [f"{name}: no"]
            continue
        lines.append(f"{fields.get('source', name) if name == 'made' else name}:")
        for field, value in fields.items():
            match field, value:
                case "label_logprobs", list(logprobs) if explanation["label_scores"]:
                    lines += _score_lines(explanation["label_scores"], logprobs)
                case "samples", list(samples):
                    lines += _sample_lines(samples)
                case _:
                    lines.append(f"  {field:<15} {_shortened(value, 18)}")
    if explanation["as_made_for"] is not None:
        lines.append(f"as it was made for: {'yes' if explanation['as_made_for'] else 'no'}")
    if explanation["reason"]:
        lines.append(f"dropped: {explanation['reason']}")
    if explanation["curated"] and not explanation["curate_is_finished"]:
        lines.append("curate is not finished: this is what it wrote last")
    lines.append(f"in training: {'yes' if explanation['in_training'] else 'no'}")
    return "\n".join(lines)


def _rows(run: Run, name: str, kind: type[Row]) -> list[Row]:
    """A file's rows, [] where there is none. A last line that is being written, or was torn by a kill, is no row."""
    path = run.file(name)
    return read_rows(path, kind, is_growing=True) if path.exists() else []


def _row(rows: Sequence[Row], row_id: str) -> Row | None:
    return next((row for row in rows if str(row["id"]) == row_id), None)


def _said(run: Run, row_id: str, inputs: Sequence[InputRow]) -> ReviewRow | None:
    return next((row for key, row in read_review(run, inputs).items() if str(key) == row_id), None)


def _without_id(row: Mapping[str, object] | None) -> Mapping[str, object] | None:
    return row and {field: value for field, value in row.items() if field not in _NOT_SHOWN}


def _known_ids(inputs: Sequence[InputRow], examples: Sequence[str]) -> str:
    """Which ids there are."""
    example_ids = f"{examples[0]} to {examples[-1]}" if len(examples) > 1 else examples[0]
    if not inputs:
        return f"generate has not made any yet, there is {example_ids}"
    return f"its rows are {inputs[0]['id']} to {inputs[-1]['id']}, and {example_ids}"


def _reason(run: Run, drop: str) -> str:
    try:
        reason = DropReason(drop)
    except ValueError:  # a person's own word, or one of another version
        return one_line(drop)
    setting = reason.setting
    flag = f" ({as_flag(setting, getattr(run.settings, setting))})" if setting else ""
    return f"{reason}: {reason.meaning}{flag}"


def _label_scores(
    run: Run, row_id: str, inputs: Sequence[InputRow], outputs: Sequence[OutputRow], is_curated: bool
) -> dict[str, Scores] | None:
    """Label -> its probability, as curate computes it.

    The bias is that of all answered rows, so it is known when annotate is finished; how much the made-for label counts,
    when curate is.
    """
    whole = [row for row in outputs if row["drop"] is None and has_label_scores(row, run.task.labels)]
    others = {row["id"] for row in inputs if source_of(row) == Source.LABELLED} | made_like_real(inputs)
    scored = [row for row in whole if row["id"] not in others]
    if len({len(row["label_logprobs"]) for row in whole}) > 1:  # somebody edited them
        return None
    place = next((place for place, row in enumerate(scored) if str(row["id"]) == row_id), None)
    if place is None:
        return None
    made_for = {row["id"]: row["label"] for row in inputs}
    scores = label_scores(
        [row["label_logprobs"] for row in scored],
        [made_for.get(row["id"]) for row in scored],
        run.task.labels,
        removes_bias=run.settings.calibrate and run.is_finished("annotate"),
        weighs_evidence=run.settings.agreement == "evidence" and is_curated,
        known=known_labels(run, inputs, whole, [row["id"] for row in scored]),
    )
    raw = scores.raw[place]
    calibrated = scores.calibrated[place] if scores.calibrated else None
    believed = scores.with_evidence[place] if scores.with_evidence else None
    return {
        label: {
            "raw": round(raw[number], 4),
            "calibrated": round(calibrated[number], 4) if calibrated else None,
            "with_evidence": round(believed[number], 4) if believed else None,
        }
        for number, label in enumerate(run.task.labels)
    }


def has_label_scores(row: OutputRow, labels: Sequence[str]) -> bool:
    """Whether a row has scores of all labels, by each prompt."""
    by_prompt = row.get("label_logprobs")
    return bool(by_prompt) and all(scores.keys() >= {*labels} for scores in by_prompt or [])


def _score_lines(scores: dict[str, Scores], logprobs: Sequence[Mapping[str, float]]) -> list[str]:
    """A line for each label, the likeliest first."""

    def last_known(label: str) -> float:
        raw, calibrated, believed = _stages_of(scores[label])
        return next(score for score in (believed, calibrated, raw) if score is not None)

    ordered = sorted(scores, key=lambda label: -last_known(label))
    listed = ordered[:MAX_SHOWN_LABELS]
    width = max(len("label"), *map(len, listed))
    lines = [
        f"  {'label':<{width}}{'raw':>7}{'calibrated':>12}{'with evidence':>15}   log-probability by prompt"
    ]
    for label in listed:
        cells = ["-" if score is None else f"{score:.4f}" for score in _stages_of(scores[label])]
        by_prompt = " ".join(f"{prompt[label]:.2f}" for prompt in logprobs)
        lines.append(f"  {label:<{width}}{cells[0]:>7}{cells[1]:>12}{cells[2]:>15}   {by_prompt}")
    if len(ordered) > len(listed):
        lines.append(f"  ... and {counted(len(ordered) - len(listed), 'label')} more (--json shows all)")
    return lines


def _stages_of(scores: Scores) -> tuple[float, float | None, float | None]:
    return scores["raw"], scores["calibrated"], scores["with_evidence"]


def _sample_lines(samples: Sequence[str]) -> list[str]:
    """Equal samples as one, the commonest first; an empty text stands for one that was cut off."""
    counts = Counter(samples).most_common()
    lines = [
        f"  {n:>3} of {len(samples):<9} {_shortened(sample, 18) or '(not at its end after --max-new-tokens)'}"
        for sample, n in counts[:MAX_SHOWN_SAMPLES]
    ]
    if len(counts) > len(lines):
        lines.append(f"  ... and {counted(len(counts) - len(lines), 'other sample')} (--json shows all)")
    return lines


def _shortened(value: object, indent: int) -> str:
    text = value if isinstance(value, str) else json_text(value)
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = f"{text[:MAX_SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return text.replace("\n", "\n" + " " * indent)
