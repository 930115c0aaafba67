"""What the pieces of a stage were made from, so that it goes on with them only while that is what it was.

    outputs.jsonl                    {"id": 7, ..., "made_from": "9f2c41d07ab35e66"}     a key in each row
    inputs.jsonl .probe.jsonl        .generate.json               {"made_from": "41d0..."}
    predictions/tuned_merged.jsonl   predictions/.tuned_merged.json    {"made_from": "7ab3...", "sha256": "c0ff..."}

A key is the hash of all that an answer depends on. Pieces whose key is another, or is not there, are made again.
"""

import hashlib
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import canonical_json, read_json, sha256_file, write_json
from sg_local.runs.directory import Run

_MAX_BYTES = 1 << 16
GENERATE_NOTE = ".generate.json"  # what made inputs, and trials of how to ask for them, were made from
# How much is made, and how fast: of these no answer depends, but for rounding.
_NOT_IN_ANSWERS = ("n_inputs", "least_made_share", "n_parallel", "n_threads", "n_gpu_layers", "working_copy")


def key_of(*parts: object) -> str:
    """A name for all that something was made from; parts are JSON data."""
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def stage_key(run: Run, stage: str) -> str:
    """The key of what a stage's rows share: the task, the base, and the settings that they may depend on."""
    settings = run.settings.seen_by(stage).as_dict()
    return key_of(task_facts(run), base_facts(run), {**settings, **dict.fromkeys(_NOT_IN_ANSWERS)})


def task_facts(run: Run) -> list[object]:
    """What the model is told of the task."""
    examples = [[example.input, example.output] for example in run.task.examples]
    return [run.task.instruction, list(run.task.labels), examples]


def base_facts(run: Run) -> list[object]:
    """Which base it is, and how it is prompted."""
    return [run.model.sha256, run.model.prompt_format]


def note_made_from(note: Path, key: str, piece: Path | None = None) -> None:
    """Writes down what pieces are made from: before they are made, or for a `piece` that is complete after it."""
    record = {"made_from": key} | ({"sha256": sha256_file(piece)} if piece else {})
    write_json(note, record)


def is_made_from(note: Path, key: str, piece: Path | None = None) -> bool:
    """Whether pieces were made from what the key stands for, and the `piece` is as it was written."""
    try:
        record = read_json(note, _MAX_BYTES)
        return bool(record == {"made_from": key} | ({"sha256": sha256_file(piece)} if piece else {}))
    except InputError:  # missing, or damaged: nobody knows
        return False
