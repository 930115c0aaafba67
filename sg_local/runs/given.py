"""A task with all that its files hold, as a run begins with it: nothing that is scored on is trained on.

    check_task("inbox.toml")
    -> Task(...), TaskRows(test=[Example(...)], inputs=["were is my parcel"], labelled=[Example(...)],
                           notes=["2 of 40 inputs are test rows, and left out"])

Inputs and labelled rows that are test rows are taken out, also where they differ in case, white space or punctuation;
test rows that are examples of the task are too.
Examples after the third count as labelled. Where the task has no examples they are chosen among the labelled rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.selfguide.given import choose_examples, n_contradicting, text_key, without_known
from sg_local.selfguide.metrics import check_labels
from sg_local.task import MAX_EXAMPLES, Example, Task, read_task
from sg_local.task_files.rows import load_inputs, load_labelled, load_test_rows

Row = TypeVar("Row")


@dataclass(frozen=True)
class TaskRows:
    """What the files of a task hold."""

    test: list[Example] = field(default_factory=list)  # no example of the task
    inputs: list[str] = field(default_factory=list)  # no test row
    labelled: list[Example] = field(default_factory=list)  # no test row
    notes: list[str] = field(default_factory=list)  # what a person should know of it


def check_task(source: str | Path | Task, test: list[Example] | None = None) -> tuple[Task, TaskRows]:
    """A task with its examples, and its rows. test: its test rows, where they are not those of its own test file.

    Raises InputError with what is wrong with the task and its files, all at once.
    """
    task, faults = read_task(source)
    rows = _all_rows(task, test, faults)
    try:
        check_labels(task.labels)
    except InputError as error:
        faults.add_of(error)
    faults.raise_any()
    known = {text_key(row.input) for row in rows.test}
    test, notes = _without_examples(task, rows.test)
    inputs, labelled = without_known(rows.inputs, known), without_known(rows.labelled, known)
    notes += [
        f"{len(before) - len(after)} of {len(before)} {name} are test rows, and left out: nothing that is scored on "
        "is trained on"
        for name, before, after in (
            ("inputs", rows.inputs, inputs),
            ("labelled rows", rows.labelled, labelled),
        )
        if len(after) < len(before)
    ]
    if task.more_examples:
        notes.append(
            f"examples after the first {MAX_EXAMPLES} count as labelled rows: {len(task.more_examples)}"
        )
        task = replace(task, more_examples=())
    if n_rows := n_contradicting([*task.examples, *labelled]):
        notes.append(
            f"{n_rows} of {len(labelled)} labelled rows have the input of an earlier one, or of an example, with "
            "another output: the first one counts"
        )
    if not task.examples:
        task, labelled = _with_chosen_examples(task, labelled)
        notes.append(f"the task has no examples: {len(task.examples)} were chosen among its labelled rows")
    return task, TaskRows(test, inputs, labelled, notes)


def _all_rows(task: Task, test: list[Example] | None, faults: Faults) -> TaskRows:
    """What the files hold, as far as they can be read; the faults of the others are added."""

    def read(load: Callable[[Task], list[Row]]) -> list[Row]:
        try:
            return load(task)
        except InputError as error:
            faults.add_of(error)
            return []

    if test is None:
        test = read(load_test_rows) if task.test else []
    return TaskRows(test, read(load_inputs), [*task.more_examples, *read(load_labelled)])


def _without_examples(task: Task, test: list[Example]) -> tuple[list[Example], list[str]]:
    """The test rows that are no examples of the task, all where no other is left; and what there is to say of it."""
    left = without_known(test, {text_key(example.input) for example in task.examples})
    if test and not left:
        return test, ["all test rows are examples of the task: scores on them say nothing of other inputs"]
    if len(left) == len(test):
        return test, []
    note = f"{len(test) - len(left)} of {len(test)} test rows are examples of the task, and not scored on"
    return left, [note]


def _with_chosen_examples(task: Task, labelled: list[Example]) -> tuple[Task, list[Example]]:
    """The task with examples, and the labelled rows without these."""
    chosen = choose_examples(labelled, task.labels)
    if not chosen:
        raise InputError(
            f"task {task.name} has no examples, and all of its labelled rows are test rows: add [[examples]]"
        )
    shown = {text_key(example.input) for example in chosen}
    examples = tuple(replace(example, other_outputs=()) for example in chosen)
    return replace(task, examples=examples), without_known(labelled, shown)
