"""The stages in their order, each in a process of its own; finished ones are skipped.

    generate -> annotate -> curate -> train -> export -> evaluate

A stage that dies takes its process with it and leaves the run as the last finished write left it. Where native code
crashed, the stage is started again without the row that did it (in_flight.py).
"""

import signal
import time
from functools import cache

from sg_local.child_process import result_from_child
from sg_local.errors import InputError, SgLocalError, signal_in_words
from sg_local.plan.machine import card_in_use, may_have_another_card
from sg_local.progress import PlaceInRun, at_place, say, working
from sg_local.runs import process
from sg_local.runs.directory import NOT_FINISHED, Run
from sg_local.runs.in_flight import forget, note_crash, recorded_by
from sg_local.runs.process import StartStage
from sg_local.runs.times import RunTimes
from sg_local.settings import STAGES

# How native code ends a process: failed assertions and bad pointers. SIGKILL is the user's, or memory that ran out.
_CRASHES = {
    getattr(signal, name)
    for name in ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
    if hasattr(signal, name)
}
MAX_CRASHES_OF_A_STAGE = 6  # three rows: more is no matter of single rows


def run_pipeline(
    run: Run,
    until: str = STAGES[-1],
    command: str = "run",
    start_stage: StartStage | None = None,
    *,
    tells_times: bool = False,
) -> bool:
    """Runs what is not finished, up to `until`; returns False when there was nothing to do.

    command: the one that the user called, and may call again. start_stage: how a stage is run, if not in a process of
    its own.

    Raises SgLocalError or InputError with the stage's own exit code; its message is already on stderr.
    """
    first = run.first_unfinished(until)
    if first is None:
        return False
    run.check_model()
    if first.reason != NOT_FINISHED:  # what was there is made again
        say(f"{first.stage} {first.reason}")
    stages = STAGES[: STAGES.index(until) + 1]
    left = stages[stages.index(first.stage) :]  # a stage that runs takes back those after it
    if "train" in left:
        _require_training(run)
    times = RunTimes(run, left) if tells_times else None
    for stage in left:
        number = f"{stages.index(stage) + 1}/{len(stages)}"
        place = f"[{number}] {stage}"
        say(place)
        started = time.monotonic()
        run.file(process.REASON_FILE).unlink(missing_ok=True)
        with at_place(times.begin(stage, number) if times else PlaceInRun(number)):
            code = _exit_code_after_crashes(run, stage, start_stage or process.in_child_process)
        if code != 0:
            again = f"the run is kept; `sg-local {command}` with the same arguments goes on with {stage}"
            if code < 0:
                raise _death(run, stage, code, again)
            kind = InputError if code == 2 else SgLocalError
            error = kind(f"{stage} did not finish (see above): {again}")
            if reason := process.reason_of_failure(run):
                error.add_note(reason)  # for who calls from Python, and does not look at stderr
            raise error
        if times:
            times.finish(stage)
        say(f"{place} done in {time.monotonic() - started:.0f} s")
    if times:
        times.say_table()
    return True


def run_one_stage(run: Run, stage: str, *, redo: bool = False) -> bool:
    """Runs one stage as the pipeline does, its process and what its crashes cost; False where it was finished.

    Raises the stage's own error.
    """
    if not run.is_due(stage) and not redo:
        return False
    run.file(process.REASON_FILE).unlink(missing_ok=True)
    redoes = iter([redo])  # after a crash it goes on

    def start_stage(run: Run, stage: str) -> int:
        return process.stage_in_child(run, stage, redo=next(redoes, False))

    code = _exit_code_after_crashes(run, stage, start_stage)
    if code != 0:
        raise _death(run, stage, code, "the run is kept; the same command goes on")
    return True


def _death(run: Run, stage: str, code: int, again: str) -> SgLocalError:
    """The error of a stage that a signal ended."""
    reason = process.reason_of_failure(run) or f"{stage} was ended by {signal_in_words(-code)}"
    if -code in _CRASHES:
        again += "; `sg-local doctor` tries whether llama.cpp works here at all"
    return SgLocalError(f"{reason}: {again}")


def _require_training(run: Run) -> None:
    """Raises InputError now, and not after the hours of the stages before, where training cannot work."""
    from sg_local.finetune.environment import require_trainer

    require_trainer(run.settings.trainer)
    card = card_in_use()
    if card or may_have_another_card():
        _try_card(card, run.settings.trainer)
    if run.settings.base_weights:
        from sg_local.proof.working_copies import check_given_weights

        check_given_weights(run)


@cache  # a bench has many runs
def _try_card(card: str, trainer: str) -> None:
    with working(f"trying whether {trainer} can use {card or 'this machine'}"):
        result_from_child("trying the card", "sg_local.finetune.load.try_card", card=card, trainer=trainer)


def _exit_code_after_crashes(run: Run, stage: str, start_stage: StartStage) -> int:
    """The stage's exit code; after a crash of native code it is started again, see in_flight.py."""
    for _ in range(MAX_CRASHES_OF_A_STAGE):
        # A record of before is of a process that was killed, or whose card ran out of memory: it counts against no row.
        before = recorded_by(run)
        code = start_stage(run, stage)
        if -code not in _CRASHES or not (rows := note_crash(run, before)):
            break
        if len(rows) == 1:
            say(
                f"{stage} was ended by {signal_in_words(-code)} on row {rows[0]}: "
                "going on, without it if it does so again"
            )
        else:
            say(
                f"{stage} was ended by {signal_in_words(-code)} with the rows {rows[0]}..{rows[-1]} in flight: "
                "going on with one at a time"
            )
    if code == 0:
        forget(run)
    return code
