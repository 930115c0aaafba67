"""The stages in their order, each in a process of its own; finished ones are skipped.

    generate -> annotate -> curate -> train -> export -> evaluate

A stage that dies takes its process with it and leaves the run as the last finished write left it. Where native code
crashed, the stage is started again without the row that did it (in_flight.py). A stage's standard input is a
pipe that nothing is written to: it ends with its parent, and so does the stage.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from sg_local.errors import InputError, SgLocalError, signal_name
from sg_local.files import read_text, write_text
from sg_local.models import resolve_model
from sg_local.progress import restore_terminal, say
from sg_local.run.directory import Run, create_or_open_run, lock_run
from sg_local.run.in_flight import forget, note_crash
from sg_local.selfguide.metrics import check_labels
from sg_local.settings import STAGES, Settings
from sg_local.task import Example, Task, load_task, load_test_rows

# -P: nothing is imported from the directory that the user works in, which may hold a `datasets.py` of their own.
# The package's own place comes last, for a checkout that is not installed.
_STAGE_PROGRAM = """
import sys
sys.path.append(sys.argv[1])
sys.argv[:2] = ["sg-local"]
from sg_local.run.pipeline import end_with_parent
end_with_parent()
from sg_local.cli import main
main()
"""

# How native code ends a process: failed assertions and bad pointers. SIGKILL is the user's, or memory that ran out.
_CRASHES = {
    getattr(signal, name)
    for name in ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
    if hasattr(signal, name)
}
_REASON = ".reason"  # why the last stage of a `run` failed, beside what the user was shown
MAX_REASON_BYTES = 1 << 20
MAX_CRASHES_OF_A_STAGE = 6  # three rows: more is no matter of single rows

_is_tied = False


def check_task(task_source: str) -> tuple[Task, list[Example]]:
    """A task and its test rows, [] where it has none. Raises InputError with what is wrong with them."""
    task = load_task(task_source)
    check_labels(task.labels)
    return task, load_test_rows(task) if task.test else []


def begin_run(
    task_source: str, model_source: str, run_dir: Path | None, settings: Settings
) -> tuple[Run, bool]:
    """The run of this task, model and settings, made if there is none; True when it is new.

    Raises InputError where one of them is wrong, or is not what the run was begun with.
    """
    task, test_rows = check_task(task_source)
    return create_or_open_run(
        run_dir or Path("runs") / task.name,
        task,
        resolve_model(model_source),
        with_full_paths(settings),
        test_rows,
    )


def with_full_paths(settings: Settings) -> Settings:
    """The settings as a run keeps them, which goes on from any directory."""
    if not settings.base_weights:
        return settings
    return replace(settings, base_weights=str(Path(settings.base_weights).expanduser().resolve()))


def run_stage(run: Run, stage: str, *, redo: bool = False) -> bool:
    """Runs one stage in this process unless it is finished; returns whether there was something to do.

    redo takes back what it and the stages after it had done. Raises InputError where an earlier stage is not
    finished or another process works on the run.
    """
    with lock_run(run.path):
        if run.is_finished(stage) and not redo:
            return False
        run.require(stage)
        if redo:
            run.forget_from(stage, keep_partial=False)
        body: Callable[[Run], None] = getattr(import_module(f"sg_local.stages.{stage}"), f"run_{stage}")
        try:
            body(run)
        except SgLocalError as error:
            if _is_tied:
                write_text(run.file(_REASON), str(error))
            raise
    return True


def run_pipeline(run: Run, until: str = STAGES[-1], command: str = "run") -> bool:
    """Runs what is not finished, up to `until`; returns False when there was nothing to do.

    `command` is the one that the user called, and may call again.

    Raises SgLocalError or InputError with the stage's own exit code; its message is already on stderr.
    """
    stages = STAGES[: STAGES.index(until) + 1]
    if run.is_finished(until):
        return False
    run.check_model()
    _require_training(run, stages)
    for number, stage in enumerate(stages, 1):
        if run.is_finished(stage):  # a stage that runs takes back those after it
            continue
        say(f"[{number}/{len(stages)}] {stage}")
        started = time.monotonic()
        run.file(_REASON).unlink(missing_ok=True)
        code = _in_own_process_until_it_holds(run, stage)
        if code != 0:
            again = f"the run is kept; `sg-local {command}` with the same arguments goes on with {stage}"
            if -code in _CRASHES:
                again += "; `sg-local doctor` tries whether llama.cpp works here at all"
            if code < 0:
                raise SgLocalError(f"{stage} was ended by {_signal(-code)}: {again}")
            error = InputError if code == 2 else SgLocalError
            raise error(f"{stage} did not finish (see above): {again}")
        say(f"[{number}/{len(stages)}] {stage} done in {time.monotonic() - started:.0f} s")
    return True


def failure(run: Run) -> str | None:
    """Why the last stage that run_pipeline started failed, in its own words; None where it had none."""
    path = run.file(_REASON)
    return read_text(path, MAX_REASON_BYTES) if path.exists() else None


def is_tied() -> bool:
    """Whether this process is one stage of a `run`, which speaks to the user in its place."""
    return _is_tied


def end_with_parent() -> None:
    """Makes this process a stage of the `run` that started it: it ends when that ends, however that ended.

    Ctrl-C reaches both; the `run` alone acts on it. Here it could strike inside a callback of a C library,
    where Python prints a KeyboardInterrupt and forgets it.
    """
    global _is_tied
    _is_tied = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_end() -> None:
        os.read(0, 1)
        restore_terminal()
        os._exit(1)  # at once, whatever the main thread is doing: a stage may be killed anywhere

    threading.Thread(target=wait_for_end, daemon=True).start()


def _require_training(run: Run, stages: tuple[str, ...]) -> None:
    """Raises InputError now, and not after the hours of the stages before, where training cannot work."""
    from sg_local.finetune.environment import require_trainer

    if "train" in stages and not run.is_finished("train"):
        require_trainer(run.settings.trainer)
        if run.settings.base_weights:
            from sg_local.proof.working_copies import check_given_weights

            check_given_weights(run)


def _in_own_process_until_it_holds(run: Run, stage: str) -> int:
    """The stage's exit code; after a crash of native code it is started again, see in_flight.py."""
    for _ in range(MAX_CRASHES_OF_A_STAGE):
        code = _in_own_process(run, stage)
        if -code not in _CRASHES or not (rows := note_crash(run)):
            break
        if len(rows) == 1:
            say(
                f"{stage} was ended by {_signal(-code)} on row {rows[0]}: going on, without it if it does so again"
            )
        else:
            say(
                f"{stage} was ended by {_signal(-code)} with the rows {rows[0]}..{rows[-1]} in flight: "
                "going on with one at a time"
            )
    if code == 0:
        forget(run)
    return code


def _in_own_process(run: Run, stage: str) -> int:
    package_parent = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-P", "-c", _STAGE_PROGRAM, package_parent, stage, "--", str(run.path)]
    handler = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # inherited, so that it holds from the first moment
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe; this ends the stage
            process.wait()
            raise
    if code < 0:
        restore_terminal()
    return code


def _signal(number: int) -> str:
    name = signal_name(number)
    return f"{name} (as the system does when memory runs out)" if name == "SIGKILL" else name
