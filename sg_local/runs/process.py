"""A stage in a process of its own, and what the run keeps of its failure.

in_child_process(run, "train")    0: finished; 1 or 2: it has said why; -11: SIGSEGV ended it
stage_in_child(run, "train")      the same for a command that is this stage: its error is raised
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from sg_local import child_process
from sg_local.child_process import ChildDied
from sg_local.errors import GOES_ON, SgLocalError, outside_cause
from sg_local.files import read_text, write_text
from sg_local.progress import PlaceInRun, at_place, get_place, say
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage

StartStage: TypeAlias = Callable[[Run, str], int]  # runs a stage and returns its exit code, -N for signal N

REASON_FILE = ".reason"  # why the last stage of a `run` failed, beside what the user was shown
MAX_REASON_BYTES = 1 << 20


def in_child_process(run: Run, stage: str) -> int:
    """Runs a stage in a process of its own and returns its exit code; an interruption ends it first."""
    try:
        return stage_in_child(run, stage)
    except SgLocalError as error:
        say(f"Error: {error}")
        _keep_reason(run, str(error))
        return error.exit_code


def stage_in_child(run: Run, stage: str, *, redo: bool = False) -> int:
    """Runs a stage in a process of its own: 0, or -N where signal N ended it. Raises its error."""
    values = run.settings.as_dict()
    try:
        child_process.result_from_child(
            stage,
            f"{__name__}.work_on_stage",
            run_dir=str(run.path),
            stage=stage,
            redo=redo,
            given={name: values[name] for name in run.given},
            place=get_place().as_dict(),
        )
    except ChildDied as death:
        _keep_reason(run, death.what)
        return -death.signal
    return 0


def work_on_stage(
    run_dir: str, stage: str, redo: bool, given: Mapping[str, Any], place: Mapping[str, Any]
) -> None:
    """A stage, in the process that was made for it."""
    try:
        with at_place(PlaceInRun(**place)):
            run_stage(open_run(Path(run_dir)).with_given(given), stage, redo=redo)
    except Exception as error:
        if (cause := outside_cause(error)) is None:
            raise
        raise SgLocalError(f"{cause}{GOES_ON}") from error


def _keep_reason(run: Run, reason: str) -> None:
    with suppress(SgLocalError):  # the disk may be full
        write_text(run.file(REASON_FILE), reason)


def reason_of_failure(run: Run) -> str | None:
    """Why the last stage that was started failed, in its own words; None where it had none."""
    path = run.file(REASON_FILE)
    return read_text(path, MAX_REASON_BYTES) if path.exists() else None
