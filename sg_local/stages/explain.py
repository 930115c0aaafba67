"""A row's life: what it was made for, what the student answered, and what became of it.

    explain(run, "7")
    -> {"id": 7, "made": {"label": "delivery", "prompt": "turns", "input": "My parcel is late.", "drop": null},
        "annotated": {"label_logprobs": [...], "output": "delivery"},
        "curated": {"output": "delivery", "confidence": 0.81, "copies": 2, "drop": null}, "in_training": true}

Reads inputs.jsonl, outputs.jsonl and train.jsonl, as far as they are there. Changes nothing.
"""

import json
from typing import Any

from sg_local.errors import InputError
from sg_local.records import read_rows
from sg_local.run import Run

MAX_SHOWN_CHARACTERS = 2000

_FILES = {"made": "inputs.jsonl", "annotated": "outputs.jsonl", "curated": "train.jsonl"}


def explain(run: Run, row_id: str) -> dict[str, Any]:
    """What each stage wrote about a row; None for one that has not seen it. Raises InputError for an unknown id."""
    found: dict[str, Any] = {"id": row_id}
    ids: list[str] = []
    for key, name in _FILES.items():
        rows = read_rows(run.file(name)) if run.file(name).exists() else []
        ids += [str(row["id"]) for row in rows]
        own = next((row for row in rows if str(row["id"]) == row_id), None)
        found[key] = own and {field: value for field, value in own.items() if field != "id"}
    if not any(found[key] for key in _FILES):
        known = dict.fromkeys(ids)
        numbers = [one for one in known if one.isdigit()]
        others = [one for one in known if not one.isdigit()]
        told = ([f"{numbers[0]} to {numbers[-1]}"] if numbers else []) + others
        raise InputError(
            f"{run.path} has no row {row_id!r:.80}: its rows are {', '.join(told) or 'not made yet'}"
        )
    curated = found["curated"]
    found["in_training"] = bool(curated and curated["drop"] is None and curated["copies"])
    return found


def explained(found: dict[str, Any]) -> str:
    """The same as lines to read."""
    lines = [f"row {found['id']}"]
    for key in _FILES:
        if found[key] is None:
            lines.append(f"{key}: no")
            continue
        lines.append(f"{key}:")
        for field, value in found[key].items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if len(text) > MAX_SHOWN_CHARACTERS:
                text = f"{text[:MAX_SHOWN_CHARACTERS]}... ({len(text)} characters)"
            lines.append(f"  {field:<15} " + text.replace("\n", "\n" + " " * 18))
    lines.append(f"in training: {'yes' if found['in_training'] else 'no'}")
    return "\n".join(lines)
