"""The tasks of tests/benchmarks/tasks: their test rows are those that the script beside them writes."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from sg_local.selfguide.exact_answers import fits, shape_of
from sg_local.task import load_task
from sg_local.task_files.rows import load_test_rows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT: dict[str, Any] = runpy.run_path(str(BENCHMARKS / "short_answers.py"))


@pytest.mark.parametrize("name", SCRIPT["TASKS"])
def test_rows_are_those_of_the_script_and_fit_the_examples(name: str) -> None:
    task = load_task(BENCHMARKS / "tasks" / f"{name}.toml")
    assert task.test
    assert task.licence == "CC0-1.0"
    rows = load_test_rows(task.test, task.labels)
    assert [row.as_row() for row in rows] == SCRIPT["rows"](name, SCRIPT["TEST_SEED"], 60)
    others = SCRIPT["rows"](name, 1, 30)
    assert not {row.input for row in rows} & {row["input"] for row in others}
    shape = shape_of([example.output for example in task.examples])
    assert (shape is None) == (name == "number-asked")
    assert shape is None or all(fits(shape, row.output) for row in rows)
