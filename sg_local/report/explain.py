"""A row's life: what it was made for, what the student answered, and what became of it.

    explain(run, "7")
    -> {"id": "7", "demonstration": null,
        "made": {"input": "My parcel is late.", "label": "delivery", "prompt": "turns", "drop": null, "seed": 90417},
        "annotated": {"label_logprobs": [{"delivery": -0.4, "refund": -2.1}], "output": "delivery", "drop": null},
        "label_scores": {"delivery": {"raw": 0.85, "calibrated": 0.72, "with_evidence": 0.93}, ...},
        "curated": {"output": "delivery", "confidence": 0.86, "copies": 2, "drop": null},
        "as_made_for": true, "reason": null, "curate_is_finished": true, "in_training": true}

Reads inputs.jsonl, outputs.jsonl and train.jsonl, as far as they are there, also while a stage is at work on one.
Changes nothing, and takes no lock.
"""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from sg_local.errors import InputError
from sg_local.files import scan_rows
from sg_local.run.directory import Run
from sg_local.selfguide.rows import DEMONSTRATION
from sg_local.selfguide.selection import (
    calibrate,
    ensemble,
    label_probabilities,
    tempered,
    with_evidence,
)
from sg_local.settings import as_flag

MAX_SHOWN_CHARACTERS = 2000  # of one text
MAX_SHOWN_LABELS = 20
MAX_SHOWN_SAMPLES = 20

_FILES = {"made": "inputs.jsonl", "annotated": "outputs.jsonl", "curated": "train.jsonl"}

# Reason -> what it says about the row, and the setting that decides it.
REASONS: dict[str, tuple[str, str | None]] = {
    "crash": ("llama.cpp crashed on it twice", None),
    "cut_off": (
        "the input was not at its end at its limit of tokens, where 0 goes by the examples",
        "max_input_tokens",
    ),
    "empty": ("it has no letter and no digit", None),
    "noise": ("it talks about the task, as assistants do, and is no example of it", None),
    "length": ("it is far longer or shorter than the demonstrations", "length_filter"),
    "marks": ("it lacks marks that all demonstrations have, or has too many", "form_filter"),
    "repetition": ("it repeats its words", "form_filter"),
    "label": ("the input is a label", None),
    "duplicate": ("an earlier input, or a demonstration, is the same", None),
    "near_duplicate": ("an earlier input, or a demonstration, has its words", "near_duplicate_rouge_l"),
    "over_context": ("it does not fit the context with the demonstrations", "n_ctx"),
    "unfinished": ("no sampled answer came to an end", "max_new_tokens"),
    "no_label": ("the commonest sampled answer is no label", None),
    "low_share": ("its samples agree too little", "min_share"),
    "copy": ("the answer copies its input", "form_filter"),
    "unrelated": ("the answer takes too few words from its input", "form_filter"),
    "disagreement": ("its answer is not the label that it was made for", "agreement"),
    "low_confidence": ("it is not among the surest, of its label where there are labels", "keep_confident"),
    "held_out": ("it is kept for scoring, as the task has no test file", None),
    "balance": ("its label has more rows than can be shown equally often", "max_copies"),
}


def explain(run: Run, row_id: str) -> dict[str, Any]:
    """What each stage wrote about a row; None for one that has not seen it. Raises InputError for an unknown id."""
    rows = {key: _rows(run, name) for key, name in _FILES.items()}
    shown = {f"{DEMONSTRATION}{number}": asdict(one) for number, one in enumerate(run.task.examples, 1)}
    found: dict[str, Any] = {"id": row_id, "demonstration": shown.get(row_id)}
    for key in _FILES:
        own = next((row for row in rows[key] if str(row["id"]) == row_id), None)
        found[key] = own and {field: value for field, value in own.items() if field != "id"}
    if not any(found[key] for key in ("demonstration", *_FILES)):
        raise InputError(f"{run.path} has no row {row_id!r:.80}: {_known(rows['made'], list(shown))}")
    made, annotated, curated = (found[key] for key in _FILES)
    is_finished = run.is_finished("curate")
    found["label_scores"] = _label_scores(run, row_id, made, rows["annotated"], is_finished)
    answer = next((row["output"] for row in (curated, annotated) if row and row["output"] is not None), None)
    label = made.get("label") if made else None
    found["as_made_for"] = None if label is None or answer is None else answer == label
    drop = next((row["drop"] for row in (curated, annotated, made) if row and row["drop"]), None)
    found["reason"] = _reason(run, drop) if drop else None
    found["curate_is_finished"] = is_finished
    found["in_training"] = bool(
        is_finished and curated and curated["drop"] is None and curated.get("copies", 1)
    )
    return found


def explained(found: dict[str, Any]) -> str:
    """The same as lines to read."""
    lines = [f"row {found['id']}"]
    keys = ["demonstration", "curated"] if found["demonstration"] else list(_FILES)
    for key in keys:
        if found[key] is None:
            lines.append(f"{key}: no")
            continue
        lines.append(f"{key}:")
        for field, value in found[key].items():
            if field == "label_logprobs" and found["label_scores"]:
                lines += _score_lines(found["label_scores"], value)
            elif field == "samples":
                lines += _sample_lines(value)
            else:
                lines.append(f"  {field:<15} {_shown(value, 18)}")
    if found["as_made_for"] is not None:
        lines.append(f"as it was made for: {'yes' if found['as_made_for'] else 'no'}")
    if found["reason"]:
        lines.append(f"dropped: {found['reason']}")
    if found["curated"] and not found["curate_is_finished"]:
        lines.append("curate is not finished: this is what it wrote last")
    lines.append(f"in training: {'yes' if found['in_training'] else 'no'}")
    return "\n".join(lines)


def _rows(run: Run, name: str) -> list[dict[str, Any]]:
    """A file's rows, [] where there is none. A last line that is being written, or was torn by a kill, is no row."""
    path = run.file(name)
    if not path.exists():
        return []
    rows = []
    for line in scan_rows(path):
        if line.row is not None and "id" in line.row:
            rows.append(line.row)
        elif line.complete:
            raise InputError(f"{path}, line {line.number}: {line.fault or 'the row has no id'}")
    return rows


def _known(made: list[dict[str, Any]], demonstrations: list[str]) -> str:
    """Which ids there are."""
    others = f"{demonstrations[0]} to {demonstrations[-1]}" if len(demonstrations) > 1 else demonstrations[0]
    if not made:
        return f"generate has not made any yet, there is {others}"
    return f"its rows are {made[0]['id']} to {made[-1]['id']}, and {others}"


def _reason(run: Run, drop: str) -> str:
    told, setting = REASONS.get(drop, ("", None))
    flag = f" ({as_flag(setting, getattr(run.settings, setting))})" if setting else ""
    return f"{drop}: {told}{flag}" if told else drop


def _label_scores(
    run: Run, row_id: str, made: dict[str, Any] | None, outputs: list[dict[str, Any]], is_curated: bool
) -> dict[str, dict[str, float | None]] | None:
    """Label -> its probability as the student gave it, without its bias, and with the label that was asked for.

    The bias is that of all answered rows, so it is known when annotate is finished; how much the label that was
    asked for counts, when curate is. The mean of several prompts, as curate takes it.
    """
    scored = [row for row in outputs if row["drop"] is None and row.get("label_logprobs")]
    place = next((place for place, row in enumerate(scored) if str(row["id"]) == row_id), None)
    if place is None:
        return None
    labels = run.task.labels
    by_prompt = [
        [[row["label_logprobs"][number][label] for label in labels] for row in scored]
        for number in range(len(scored[place]["label_logprobs"]))
    ]
    raw = ensemble([label_probabilities(prompt[place]) for prompt in by_prompt])
    calibrated: list[float] | None = None
    believed: list[float] | None = None
    if run.is_finished("annotate"):
        parts = [
            calibrate(prompt) if run.settings.calibrate else [label_probabilities(row) for row in prompt]
            for prompt in by_prompt
        ]
        all_rows = [ensemble(own) for own in zip(*parts, strict=True)]
        calibrated = all_rows[place] if run.settings.calibrate else None
        agreement = run.manifest()["stages"]["curate"].get("agreement", {}) if is_curated else {}
        reliable = agreement.get("reliability", 0.0)
        if reliable > 1 / len(labels) and made:
            believed = with_evidence(
                tempered(all_rows, reliable)[place], labels.index(made["label"]), reliable
            )
    return {
        label: {
            "raw": round(raw[number], 4),
            "calibrated": None if calibrated is None else round(calibrated[number], 4),
            "with_evidence": None if believed is None else round(believed[number], 4),
        }
        for number, label in enumerate(labels)
    }


def _score_lines(scores: dict[str, dict[str, float | None]], logprobs: list[dict[str, float]]) -> list[str]:
    """A line for each label, the likeliest first."""
    names = ("raw", "calibrated", "with_evidence")

    def last_known(label: str) -> float:
        return [value for name in names if (value := scores[label][name]) is not None][-1]

    ordered = sorted(scores, key=lambda label: -last_known(label))
    shown = ordered[:MAX_SHOWN_LABELS]
    width = max(len("label"), *map(len, shown))
    lines = [
        f"  {'label':<{width}}{'raw':>7}{'calibrated':>12}{'with evidence':>15}   log-probability by prompt"
    ]
    for label in shown:
        cells = ["-" if scores[label][name] is None else f"{scores[label][name]:.4f}" for name in names]
        told = " ".join(f"{own[label]:.2f}" for own in logprobs)
        lines.append(f"  {label:<{width}}{cells[0]:>7}{cells[1]:>12}{cells[2]:>15}   {told}")
    if len(ordered) > len(shown):
        lines.append(f"  ... and {len(ordered) - len(shown)} labels more (--json shows all)")
    return lines


def _sample_lines(samples: list[str]) -> list[str]:
    """Equal samples as one, the commonest first; an empty text stands for one that was cut off."""
    counts = Counter(samples).most_common()
    lines = [
        f"  {n:>3} of {len(samples):<9} {_shown(sample, 18) or '(not at its end after --max-new-tokens)'}"
        for sample, n in counts[:MAX_SHOWN_SAMPLES]
    ]
    if len(counts) > len(lines):
        lines.append(f"  ... and {len(counts) - len(lines)} other samples (--json shows all)")
    return lines


def _shown(value: Any, indent: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = f"{text[:MAX_SHOWN_CHARACTERS]}... ({len(text)} characters)"
    return text.replace("\n", "\n" + " " * indent)
