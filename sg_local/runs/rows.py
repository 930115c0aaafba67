"""The rows of a run's files as the stages after them read them: a person may have edited a file in between.

    read_outputs(run, read_inputs(run))
    -> "runs/a/outputs.jsonl: there is no row for the input 7; to leave it out, write a reason into its drop"

files.read_rows looks at each row alone: its keys and their types. Here rows are looked at together, and with the
settings of the run: every id stands once, outputs belong to inputs, and a row that is not dropped has what the next
stage computes with. Raises InputError with the faults of a file at once.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, read_rows
from sg_local.runs.directory import Run
from sg_local.selfguide.given import held_out_labelled, labelled_id
from sg_local.selfguide.labels import Known
from sg_local.selfguide.rows import (
    DropReason,
    InputRow,
    OutputRow,
    PairRow,
    Source,
    is_input_id,
    is_kept,
    source_of,
)

MAX_COPIES = 100_000  # of one row in training


def read_inputs(run: Run) -> list[InputRow]:
    """The rows of inputs.jsonl."""
    path, faults = run.file("inputs.jsonl"), Faults()
    rows = read_rows(path, InputRow)
    _check_ids(path, [row["id"] for row in rows], faults, of_inputs=True)
    for row in rows:
        if row["drop"] is None and not row["input"].strip():
            faults.add(f"{path}: the input of row {row['id']} is empty; write a reason into its drop")
        if row.get("source", Source.MADE) not in [*Source]:
            faults.add(f"{path}: row {row['id']} is from {row['source']!r:.40}; write {' or '.join(Source)}")
        if row["label"] is not None and run.task.labels and row["label"] not in run.task.labels:
            faults.add(
                f"{path}: row {row['id']} was made for {row['label']!r:.80}, no label of the task; write one, or null"
            )
    faults.raise_any()
    return rows


def read_outputs(run: Run, inputs: Sequence[InputRow]) -> list[OutputRow]:
    """The rows of outputs.jsonl: one for each of the inputs that is not dropped."""
    path, faults = run.file("outputs.jsonl"), Faults()
    rows = read_rows(path, OutputRow)
    _check_ids(path, [row["id"] for row in rows], faults, of_inputs=True)
    kept = {row["id"] for row in rows_to_answer(run, inputs)}
    known, answered = {row["id"] for row in inputs}, {row["id"] for row in rows}
    for row in rows:
        if row["id"] not in known:
            faults.add(f"{path}: row {row['id']} is of no input in inputs.jsonl; remove it")
        for fault in _output_faults(run, row):
            faults.add(f"{path}: row {row['id']} {fault}; {_redo(run, 'annotate')}")
    n_prompts = {
        len(row["label_logprobs"]) for row in rows if row["drop"] is None and row.get("label_logprobs")
    }
    if len(n_prompts) > 1:
        numbers = " and ".join(map(str, sorted(n_prompts)))
        faults.add(
            f"{path}: its label_logprobs are of {numbers} prompts, not of one number; {_redo(run, 'annotate')}"
        )
    for row_id in [row["id"] for row in inputs if row["id"] in kept - answered]:
        faults.add(
            f"{path}: there is no row for the input {row_id}; to leave it out, write a reason into its drop, or "
            f"{_redo(run, 'annotate')}"
        )
    faults.raise_any()
    return rows


def rows_to_answer(run: Run, inputs: Sequence[InputRow]) -> list[InputRow]:
    """The inputs that annotate answers: all that are not dropped.

    Labelled rows are among them where their label scores correct the calibration of real inputs.
    """
    kept = [row for row in inputs if row["drop"] is None]
    if scores_labels(run) and any(source_of(row) == Source.GIVEN for row in kept):
        return kept
    return [row for row in kept if source_of(row) != Source.LABELLED]


def scores_labels(run: Run) -> bool:
    """Whether annotate computes the scores of all labels."""
    return run.task.is_classification and run.settings.label_answers == "scores"


def labelled_pairs(run: Run, inputs: Sequence[InputRow]) -> list[PairRow]:
    """The labelled rows as they go into train.jsonl, those that are held out among them.

    Raises InputError where inputs.jsonl has one that labelled.jsonl has not.
    """
    outputs: dict[int | str, str] = {
        labelled_id(number): row.output for number, row in enumerate(run.labelled_rows, 1)
    }
    rows = [row for row in inputs if source_of(row) == Source.LABELLED]
    if unknown := [row["id"] for row in rows if row["id"] not in outputs]:
        raise InputError(f"{run.file('labelled.jsonl')} has no {unknown[0]}; {_redo(run, 'generate')}")
    kept = [row["id"] for row in rows if row["drop"] is None]
    held_out = set() if run.file("test.jsonl").exists() else held_out_labelled(kept, run.settings.seed)
    return [
        {
            "id": row["id"],
            "input": row["input"],
            "output": outputs[row["id"]],
            "confidence": 1.0,
            "targets": None,
            "copies": 1,
            "drop": DropReason.HELD_OUT if row["id"] in held_out else row["drop"],
            "source": Source.LABELLED,
        }
        for row in rows
    ]


def known_labels(
    run: Run, inputs: Sequence[InputRow], outputs: Sequence[OutputRow], scored: Iterable[int | str]
) -> Known:
    """What is known beside the label scores of rows. scored: their ids."""
    logprobs = {row["id"]: row.get("label_logprobs") for row in outputs}
    gold = [
        (scores, pair["output"])
        for pair in labelled_pairs(run, inputs)
        if is_kept(pair) and (scores := logprobs.get(pair["id"]))
    ]
    real = {row["id"] for row in inputs if source_of(row) == Source.GIVEN}
    return Known([row_id in real for row_id in scored], run.task.shares, gold)


def read_pairs(run: Run) -> list[PairRow]:
    """The rows of train.jsonl."""
    path, faults = run.file("train.jsonl"), Faults()
    rows = read_rows(path, PairRow)
    _check_ids(path, [row["id"] for row in rows], faults)
    for row in rows:
        for fault in _pair_faults(run, row):
            faults.add(f"{path}: row {json.dumps(row['id'])[:80]} {fault}")
    faults.raise_any()
    return rows


def _check_ids(path: Path, ids: Iterable[int | str], faults: Faults, *, of_inputs: bool = False) -> None:
    seen: set[int | str] = set()
    for row_id in ids:
        if of_inputs and not is_input_id(row_id):
            faults.add(
                f"{path}: the id {json.dumps(row_id)[:80]} is not a number, nor given-1 or labelled-1; write one"
            )
        if row_id in seen:
            faults.add(
                f"{path}: the id {json.dumps(row_id)[:80]} stands in two rows; give one of them another"
            )
        seen.add(row_id)


def _output_faults(run: Run, row: OutputRow) -> Iterator[str]:
    """What a row that is not dropped lacks of what annotate writes with the run's settings."""
    if row["drop"] is not None:
        return
    settings, labels = run.settings, set(run.task.labels)
    if row["output"] is None:
        yield "is not dropped and has no output"
    if labels and settings.label_answers == "scores":
        scores = row.get("label_logprobs")
        if not scores or any(by_prompt.keys() != labels for by_prompt in scores):
            yield "has no label_logprobs of all labels of the task"
        return
    if not row.get("samples"):
        yield "has no samples"
    if "share" not in row:
        yield "has no share"
    if not labels and settings.choose_by == "information" and "information" not in row:
        yield "has no information"


def _pair_faults(run: Run, row: PairRow) -> Iterator[str]:
    if not 0 <= row["copies"] <= MAX_COPIES:
        yield f"has {row['copies']} copies; write a number from 0 to {MAX_COPIES}"
    if row["drop"] is not None:
        return
    if not row["input"].strip():
        yield "is not dropped and has no input; write a reason into its drop"
    if not (row["output"] or "").strip():
        yield "is not dropped and has no output; write a reason into its drop"
    elif run.task.labels and row["output"] not in run.task.labels:
        yield f"has the output {row['output']!r:.80}, no label of the task; write one, or a reason into its drop"
    targets = row["targets"]
    if targets is not None and not (
        all(0 <= share < math.inf for share in targets.values()) and sum(targets.values()) > 0
    ):
        yield "has targets that are no probabilities; write null"


def _redo(run: Run, stage: str) -> str:
    return f"`sg-local {stage} {run.path} --redo` makes them anew"
