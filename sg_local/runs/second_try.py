"""A run that begins with what another one made: stages that the changed settings do not reach are copied.

    run_from("inbox.toml", "runs/inbox", {"epochs": 5})
    runs/inbox-epochs=5/manifest.json    {"stages": {"generate": {..., "from_run": "/home/me/runs/inbox"}, ...}}

Also copied are the base's answers to the same test rows. The other run is only read, and locked meanwhile. Which stages
a setting reaches follows from where it is declared (settings.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sg_local.errors import InputError, SgLocalError
from sg_local.files import sha256_file
from sg_local.progress import say
from sg_local.runs import process
from sg_local.runs.begin import begin_run, changed_settings, with_full_paths
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.loop import Result, finish
from sg_local.runs.made_from import GENERATE_NOTE, is_made_from, stage_key
from sg_local.runs.pipeline import run_pipeline
from sg_local.runs.process import StartStage
from sg_local.runs.stage_files import BEGUN_WITH
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.evaluation import predictions_file, predictions_note
from sg_local.settings import STAGES, resolve_settings, unreached
from sg_local.task import Task

# Settings that the base's greedy answers depend on; others leave the answers as they are.
_READ_BY_BASE = {"prompt_format", "n_ctx", "n_parallel", "n_threads", "n_gpu_layers", "max_new_tokens"}


def run_from(
    task: str | Path | Task,
    other_dir: str | Path,
    changes: Mapping[str, Any],
    *,
    model: str | Path | None = None,
    run_dir: str | Path | None = None,
    until: str = STAGES[-1],
) -> Result:
    """The whole loop in a new run, which has another run's settings but for the changes, and keeps what these leave.

    Called again with the same arguments, it goes on where it stopped. model: the other run's where none is given.
    run_dir: beside the other run where none is given, with the changes in its name.

    Raises InputError where an argument is wrong or nothing differs from the other run, and as `run` does.
    """
    other = open_run(Path(other_dir))
    settings = with_full_paths(resolve_settings("default", {**other.settings.as_dict(), **changes}))
    changed = {name: getattr(settings, name) for name in changed_settings(other.settings, settings)}
    path = Path(run_dir) if run_dir else _beside(other.path, changed)
    if path.resolve() == other.path.resolve():
        raise InputError(
            f"{path} is the run to begin from, which stays as it is: choose another with --run DIR"
        )
    run, is_new = begin_run(task, model or other.model.path, path, settings, other_than=other)
    say(f"{'new run' if is_new else 'run'} {run.path}: {run.task.name} with {run.model.path.name}")
    if not run.manifest()["stages"]:
        kept = stages_to_keep(run, other)
        if kept:
            take_stages(run, other, kept)
        elif makes_the_same(run, other):
            take_pieces(run, other, STAGES[0])
            kept = ("made inputs with their answers, beside which other rows come",)
        say(f"kept of {other.path}: {', '.join(kept) or 'nothing, its first stage would not be the same'}")
    return finish(run, until, run_rest(run, other, until))


def stages_to_keep(run: Run, other: Run) -> tuple[str, ...]:
    """The stages that are finished in the other run, and would be the same in this one."""
    if (run.model.sha256, run.model.prompt_format) != (other.model.sha256, other.model.prompt_format):
        return ()
    first = other.first_unfinished()
    finished = STAGES[: STAGES.index(first.stage)] if first else STAGES
    entries = other.manifest()["stages"]
    kept: list[str] = []
    for stage in unreached(changed_settings(other.settings, run.settings)):
        if stage not in finished or not _begins_with_the_same(run, entries[stage]):
            break
        kept.append(stage)
    return tuple(kept)


def take_stages(run: Run, other: Run, stages: Sequence[str]) -> None:
    """Copies the first stages of another run, in which they are finished, in place of what is here."""
    with lock_run(other.path), lock_run(run.path):
        run.forget_from(STAGES[0], keep_partial=False)
        run.take_over(other, stages)


def take_pieces(run: Run, other: Run, stage: str) -> None:
    """Copies what a stage of the other run made row by row: here it goes on with the rows that would be the same.

    Made inputs do not depend on real and labelled ones, nor on their number.
    """
    with lock_run(other.path), lock_run(run.path):
        run.forget_from(stage, keep_partial=False)
        run.copy_files(other, other.pieces(stage))


def makes_the_same(run: Run, other: Run) -> bool:
    """Whether made inputs would be the same, whatever is brought beside them."""
    return other.file("inputs.jsonl").exists() and is_made_from(
        other.file(GENERATE_NOTE), stage_key(run, STAGES[0])
    )


def _goes_on_with_pieces(run: Run, other: Run) -> bool:
    """Whether the inputs are of this run, made as the other's, and are not answered yet."""
    is_own = "from_run" not in run.manifest()["stages"][STAGES[0]]
    return is_own and not run.file("outputs.jsonl").exists() and makes_the_same(run, other)


def run_rest(
    run: Run,
    other: Run,
    until: str = STAGES[-1],
    command: str = "run",
    start_stage: StartStage | None = None,
) -> bool:
    """Runs what is not finished, as `run_pipeline` does; `evaluate` comes upon the base's answers of the other run."""

    def start_with_answers(run: Run, stage: str) -> int:
        if stage == STAGES[1] and _goes_on_with_pieces(run, other):
            with _or_else("all inputs are answered anew"):
                take_pieces(run, other, stage)
        if stage == STAGES[-1]:
            with _or_else("the base answers again"):
                _take_base_answers(run, other)
        return (start_stage or process.in_child_process)(run, stage)

    return run_pipeline(run, until, command, start_with_answers, tells_times=command == "run")


def assigned(name: str, value: Any) -> str:
    """A setting and its value: "epochs=5", "calibrate=false"."""
    return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def as_file_name(text: str) -> str:
    """The text as the name of one file, also where it holds a path."""
    return re.sub(r"[^\w=., -]", lambda match: f"%{ord(match[0]):02x}", text)


def _beside(path: Path, changed: Mapping[str, Any]) -> Path:
    if not changed:
        raise InputError(
            f"no setting differs from those of {path}: give one, such as --epochs, or --run DIR if the task changed"
        )
    place = path if path.name not in ("", "..") else path.resolve()
    name = as_file_name(",".join(assigned(*item) for item in changed.items()))
    return place.with_name(f"{place.name}-{name}")


def _begins_with_the_same(run: Run, entry: Mapping[str, Any]) -> bool:
    """Whether a run was begun with the files that a stage of another one read, as its manifest entry has them."""
    read = {name: sha256 for name, sha256 in entry["reads"].items() if name in BEGUN_WITH}
    return all(
        run.file(name).exists() and sha256_file(run.file(name)) == sha256 for name, sha256 in read.items()
    ) and all(
        run.file(name).exists() == was_there
        for name, was_there in entry.get("looks_for", {}).items()
        if name in BEGUN_WITH
    )


def _take_base_answers(run: Run, other: Run) -> None:
    """Copies answers of the base that depend on no made rows, nor on a changed setting.

    `evaluate` goes on with those that were given to the same rows, and makes the others anew.
    """
    if _READ_BY_BASE & {*changed_settings(other.settings, run.settings)}:
        return
    with lock_run(other.path), lock_run(run.path):
        for contender in Contender:
            if contender.uses_made_rows or run.file(predictions_file(contender)).exists():
                continue
            # The note first: answers without it are not gone on with.
            names = (predictions_note(contender), predictions_file(contender))
            run.copy_files(other, [name for name in names if other.file(name).exists()])


@contextmanager
def _or_else(what_comes: str) -> Iterator[None]:
    """Says what comes where nothing can be copied: the other run is at work, or gone by now."""
    try:
        yield
    except SgLocalError as error:
        say(f"{what_comes}: {error}")
