"""Killed at every place where a stage changes the disk, and called again: the files of an unbroken run, and no other.

A kill is simulated in this process (disk.py). There are 627 places in the cases below, and at each the second call is
killed once more in its turn. The same with no room on the disk, from each of 246 writes on: one line says so, nothing
that was finished is lost, and with room again the stage goes on. For `bench` and `models pull`: test_kills_of_commands.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from disk import Disk, Files, files_in, put_back, without_chance
from messages import assert_says
from scripted_engine import ScriptedEngine
from stand_ins import make_calls_small, replace_export, replace_sampling, replace_training, scores

from sg_local.errors import SgLocalError
from sg_local.files import find_leftovers, read_rows, write_rows
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.process import stage_in_child
from sg_local.runs.stage import run_stage
from sg_local.settings import STAGES, Settings
from sg_local.task import load_task

FREE_TASK = """name = "names"
instruction = "Name it."

[[examples]]
input = "I want my money back."
output = "Refund it now."
"""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    make_calls_small(monkeypatch, n_rows=3, n_trials=2)
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


def state(files: Files) -> dict[str, object]:
    """All that is in a run; of the manifest, what does not tell the time."""
    stages = json.loads(files.get("manifest.json") or '{"stages": {}}')["stages"]
    entries = {name: {key: entry[key] for key in ("reads", "writes")} for name, entry in stages.items()}
    return {**files, "manifest.json": entries}


def finish_stages(run: Run, until: str, edit: Callable[[Run], None] | None) -> Files:
    """The run with the stages up to this one, and what a person did then."""
    for earlier in STAGES[: STAGES.index(until) + 1] if until else ():
        run_stage(run, earlier)
    if edit:
        edit(run)
    return files_in(run.path)


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_called_again_a_stage_ends_as_if_unbroken(
    begun: Run, disk: Disk, case: str
) -> None:
    stage, finished, edit, redo = CASES[case]
    before = finish_stages(begun, finished, edit)

    def call(*, kill_at: int | None = None) -> Files:
        run = open_run(begun.path)
        with disk.killed_at(kill_at):
            # Once taken back, it is gone on with.
            run_stage(run, stage, redo=redo and run.is_finished(stage))
        return files_in(begun.path)

    unbroken = state(call())
    n_changes = disk.count
    assert n_changes >= 3
    seen: list[dict[str, object]] = []

    def assert_goes_on(left: Files, where: str) -> None:
        if (this := without_chance(state(left))) not in seen:  # what was left once goes on as it did then
            seen.append(this)
            assert state(call()) == unbroken, where

    for number in range(1, n_changes + 1):
        put_back(begun.path, before)
        killed = call(kill_at=number)
        assert_goes_on(killed, f"killed at change {number} of {n_changes}")
        put_back(begun.path, killed)
        assert_goes_on(call(kill_at=2), f"killed at {number} of {n_changes}, and at 2")


@pytest.mark.parametrize("case", ["annotate, of edited inputs", *STAGES])
def test_with_no_room_anywhere_a_stage_says_so_and_goes_on_when_there_is(
    begun: Run, disk: Disk, case: str
) -> None:
    stage, finished, edit, redo = CASES[case]
    before = finish_stages(begun, finished, edit)
    earlier = [
        name
        for earlier in STAGES[: STAGES.index(stage)]
        for name in begun.manifest()["stages"][earlier]["writes"]
    ]
    kept = {name: before.get(name) for name in ("task.toml", "settings.toml", "test.jsonl", *earlier)}

    def call(*, full_from: int | None = None) -> Files:
        run = open_run(begun.path)
        with disk.full_from(full_from):
            stage_in_child(run, stage, redo=redo and run.is_finished(stage))
        return files_in(begun.path)

    unbroken = state(call())
    n_writes = disk.count
    assert n_writes >= 2
    for number in range(1, n_writes + 1):
        put_back(begun.path, before)
        with pytest.raises(SgLocalError) as caught:
            call(full_from=number)
        where = f"no room from write {number} of {n_writes} on"
        (line,) = str(caught.value).splitlines()
        assert_says(line, "free some space")
        left = files_in(begun.path)
        assert {name: left.get(name) for name in kept} == kept, where
        assert find_leftovers(begun.path) == [], where
        assert state(call()) == unbroken, where
