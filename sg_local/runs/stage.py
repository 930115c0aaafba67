"""One stage of a run, in this process.

run_stage(run, "curate")    True: it ran; False: it was finished
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from sg_local.runs.directory import Run
from sg_local.runs.lock import lock_run


def run_stage(run: Run, stage: str, *, redo: bool = False) -> bool:
    """Runs one stage unless it is finished; returns whether there was something to do.

    redo takes back what it and the stages after it had done. Raises InputError where an earlier stage is not
    finished or another process works on the run.
    """
    with lock_run(run.path):
        if not run.is_due(stage) and not redo:
            return False
        run.check_model()
        if redo:
            run.forget_from(stage, keep_partial=False)
        body: Callable[[Run], None] = getattr(import_module(f"sg_local.stages.{stage}"), f"run_{stage}")
        body(replace(run, settings=run.settings.seen_by(stage)))
    return True
