"""A task file out of answers to questions, checked answer by answer.

faults_of(name="My task")        ["name 'My task' must be 1 to 64 of a-z 0-9 . _ - ..."]
found_labels(rows)               ["login", "refund"], where the outputs of labelled rows are a small closed set
draft_text({"name": "my-task", ...}, Path("my-task.toml"))      the text of the file
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sg_local.errors import InputError
from sg_local.files import Faults, toml_text
from sg_local.task import TASK_KEYS, Example, Task, parse_task
from sg_local.task_files.importing import labels_among
from sg_local.task_files.row_files import RowFile
from sg_local.task_files.rows import load_inputs, load_labelled


def faults_of(**values: object) -> list[str]:
    """What is wrong with some values of a task file, if the others are right."""
    labels = values.get("labels")
    output = labels[0] if isinstance(labels, list) and labels else "a"
    right = {"name": "a", "instruction": "a", "examples": [{"input": "a", "output": output}]}
    place = Path.cwd() / "task"
    try:
        parse_task(right | values, place)
    except InputError as error:
        return [line.removeprefix(f"{place}: ") for line in str(error).splitlines()]
    return []


def file_faults(
    inputs: RowFile | None = None, labelled: RowFile | None = None, labels: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with the files of a task with these labels."""
    task, faults = Task("a", "a", (), labels, inputs=inputs, labelled=labelled), Faults()
    for load in (load_inputs, load_labelled):
        try:
            load(task)
        except InputError as error:
            faults.add_of(error)
    return faults.first


def labelled_rows(file: RowFile) -> list[Example]:
    """The rows of a file of labelled rows, whatever their outputs. Raises InputError with what is wrong with it."""
    return load_labelled(Task("a", "a", (), labelled=file))


def found_labels(rows: Sequence[Example]) -> list[str]:
    """The labels of labelled rows, sorted; [] where their outputs are no small closed set."""
    return sorted(labels_among(row.output for row in rows).values())


def draft(values: dict[str, object], path: Path) -> tuple[Task, str]:
    """A task, and the text of its file, which is to stand at `path`.

    Values that are empty are left out; files are named as seen from the working directory. Raises InputError with all
    that is wrong with it.
    """
    table = {key: values[key] for key in TASK_KEYS if values.get(key)}
    for key in ("inputs", "labelled"):
        if isinstance(file := table.get(key), RowFile):
            default = RowFile(file.path)
            table[key] = {"file": os.path.relpath(file.path, path.parent)} | {
                name: getattr(file, name)
                for name in ("column", "output_column", "encoding")
                if getattr(file, name) != getattr(default, name)
            }
    return parse_task(table, path), toml_text(table)
