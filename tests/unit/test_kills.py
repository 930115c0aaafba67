"""Killed at every place where a stage changes the disk, and called again: the files of an unbroken run, and no other.

A kill is simulated in this process: from the n-th change on, every further one is refused, as by a process that is
gone; also those that `finally` and `except` would make. Appended lines are torn in half. There are 462 places in the
cases below, and at each the second call is killed once more in its turn.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine
from stand_ins import replace_export, replace_sampling, replace_training, scores

import sg_local.stages.annotate as annotate
import sg_local.stages.generate as generate
from sg_local.files import read_rows, write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task

FREE_TASK = """name = "names"
instruction = "Name it."

[[examples]]
input = "I want my money back."
output = "Refund it now."
"""
CHANGES = ("replace", "unlink", "rmdir", "mkdir", "write", "ftruncate")


class Killed(BaseException):
    """The process is gone."""


class Disk:
    """Counts what changes the disk, and refuses it from the n-th change on; a write is torn then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.kill_at: int | None = None
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))

    @contextmanager
    def killed_at(self, number: int | None) -> Any:
        """The body ends by a kill at its n-th change, if it comes to one."""
        self.count, self.kill_at = 0, number
        try:
            with suppress(Killed):
                yield
        finally:
            self.kill_at = None

    def _counted(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(target: Any, *arguments: Any, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("filelock"):
                return change(target, *arguments, **options)
            self.count += 1
            if self.kill_at is not None and self.count >= self.kill_at:
                if name == "write" and self.count == self.kill_at:
                    (data,) = arguments
                    change(target, data[: len(data) // 2])
                raise Killed
            return change(target, *arguments, **options)

        return counted


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(generate, "ROWS_PER_CALL", 3)
    monkeypatch.setattr(generate, "N_TRIALS", 2)
    monkeypatch.setattr(annotate, "QUESTIONS_PER_CALL", 3)
    monkeypatch.setattr(annotate, "SAMPLED_INPUTS_PER_CALL", 3)
    ScriptedEngine(label_logprobs=scores).replace_llama_cpp(monkeypatch)
    replace_sampling(monkeypatch)
    replace_training(monkeypatch)
    replace_export(monkeypatch)
    return Disk(monkeypatch)


@pytest.fixture(params=["free", "labels"])
def begun(request: pytest.FixtureRequest, tmp_path: Path, task: Path, model: Path) -> Run:
    """A run of a task with free answers and no test rows, or of one with labels and test rows."""
    if request.param == "free":
        task = tmp_path / "names.toml"
        task.write_text(FREE_TASK)
    settings = Settings(n_inputs=8, n_samples=2, form_filter=False)
    return create_or_open_run(tmp_path / "killed", load_task(task), model, settings)[0]


def edit_inputs(run: Run) -> None:
    """As a person does it: one text is another, one row is dropped, one is put in."""
    rows = read_rows(run.file("inputs.jsonl"))
    kept = [row for row in rows if row["drop"] is None]
    kept[1]["input"] = "Edited by hand today."
    kept[4]["drop"] = "by hand"
    write_rows(run.file("inputs.jsonl"), [*rows, {**kept[0], "id": 99, "input": "Put in by hand today."}])


def edit_task(run: Run) -> None:
    path = run.file("task.toml")
    path.write_text(path.read_text().replace(run.task.instruction, "Say what it is."))


def edit_served(run: Run) -> None:
    rows = read_rows(run.file("predictions/tuned_merged.jsonl"))
    write_rows(run.file("predictions/tuned_merged.jsonl"), [{**row, "prediction": "by hand"} for row in rows])


# What is killed, after which stages were finished and what a person did then.
CASES: dict[str, tuple[str, str, Callable[[Run], None] | None, bool]] = {
    "generate": ("generate", "", None, False),
    "generate, of another task": ("generate", "generate", edit_task, False),
    "annotate": ("annotate", "generate", None, False),
    "annotate, of edited inputs": ("annotate", "annotate", edit_inputs, False),
    "annotate --redo": ("annotate", "evaluate", None, True),
    "curate": ("curate", "annotate", None, False),
    "train": ("train", "curate", None, False),
    "train --redo": ("train", "evaluate", None, True),
    "export": ("export", "train", None, False),
    "export --redo": ("export", "evaluate", None, True),
    "evaluate": ("evaluate", "export", None, False),
    "evaluate, of edited answers": ("evaluate", "evaluate", edit_served, False),
}


def state(run: Run) -> dict[str, object]:
    """All that is there, and what it holds; of the manifest, what does not tell the time."""
    stages = run.manifest()["stages"]
    entries = {name: {key: entry[key] for key in ("reads", "writes")} for name, entry in stages.items()}
    files = {
        str(path.relative_to(run.path)): path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file() and path.name not in {".lock", "manifest.json"}
    }
    directories = {
        str(path.relative_to(run.path)): "directory" for path in run.path.rglob("*") if path.is_dir()
    }
    return {**files, **directories, "manifest.json": entries}


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_called_again_a_stage_ends_as_if_unbroken(
    begun: Run, disk: Disk, case: str
) -> None:
    stage, finished, edit, redo = CASES[case]
    for earlier in STAGES[: STAGES.index(finished) + 1] if finished else ():
        run_stage(begun, earlier)
    if edit:
        edit(begun)
    before = begun.path.with_name("before")
    shutil.copytree(begun.path, before)

    def called_with_kills(*kills: int | None) -> dict[str, object]:
        shutil.rmtree(begun.path)
        shutil.copytree(before, begun.path)
        for number in kills:
            run = open_run(begun.path)
            with disk.killed_at(number):
                # Once taken back, it is gone on with.
                run_stage(run, stage, redo=redo and run.is_finished(stage))
        return state(open_run(begun.path))

    unbroken = called_with_kills(None)
    n_changes = disk.count
    assert n_changes >= 3
    for number in range(1, n_changes + 1):
        assert called_with_kills(number, None) == unbroken, f"killed at change {number} of {n_changes}"
        assert called_with_kills(number, 2, None) == unbroken, f"killed at {number} of {n_changes}, and at 2"
