"""The units of work of a bench, a run each, and how they are worked on: here, one after the other.

    Unit(run, None).name                      "sst2"
    Unit(run, Ablation("rank", 8)).name       "sst2 with rank=8"       it begins with what the run of sst2 has
    for ended in in_turn(units, ...)          as they end: (unit, True, None)

placing.py places the same units on the nodes of a cluster.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sg_local.bench.ablation import Ablation, begin_ablation
from sg_local.errors import SgLocalError
from sg_local.progress import say
from sg_local.runs.begin import ModelFile
from sg_local.runs.directory import Run
from sg_local.runs.pipeline import run_pipeline
from sg_local.runs.process import StartStage
from sg_local.runs.second_try import run_rest


@dataclass(frozen=True)
class Unit:
    """The run of a task, or that of an ablation of it, which can begin when the first is finished."""

    task_run: Run
    ablation: Ablation | None = None

    @property
    def name(self) -> str:
        """What it is called in messages, and among the failed ones."""
        task = self.task_run.task.name
        return f"{task} with {self.ablation.text}" if self.ablation else task

    @property
    def base(self) -> Run | None:
        """The run that it begins with."""
        return self.task_run if self.ablation else None

    def path(self, bench: Path) -> Path:
        """The directory of its run."""
        return self.ablation.place(bench) / self.task_run.task.name if self.ablation else self.task_run.path

    def begin(self, bench: Path, model: ModelFile) -> Run | None:
        """The run to be worked on; None if there is nothing to do. Raises SgLocalError where it cannot begin."""
        if self.ablation:
            return begin_ablation(self.ablation, self.task_run, bench, model)
        return self.task_run


class Ended(NamedTuple):
    """A unit that is no longer worked on. had_work: something was left to do; error: why it is not finished."""

    unit: Unit
    had_work: bool
    error: SgLocalError | None = None


CanBegin = Callable[[Unit], bool]


def finish(run: Run, base: Run | None, start_stage: StartStage | None = None) -> None:
    """Runs the unfinished stages of a unit's run. Raises SgLocalError or InputError as the pipeline does."""
    if base:
        run_rest(run, base, command="bench", start_stage=start_stage)
    else:
        run_pipeline(run, command="bench", start_stage=start_stage)


def in_turn(units: Sequence[Unit], bench: Path, model: ModelFile, can_begin: CanBegin) -> Iterator[Ended]:
    """Works on the units in their order, in this process. can_begin: asked when a unit's turn has come."""
    n_tasks = sum(not unit.ablation for unit in units)
    for number, unit in enumerate(units, 1):
        if not can_begin(unit):
            continue
        try:
            run = unit.begin(bench, model)
            if run and unit.ablation:
                say(f"{unit.ablation.text}: {run.task.name}, {run.path}")
            elif run:
                say(f"task {number} of {n_tasks}: {run.task.name}, {run.path}")
            if run:
                finish(run, unit.base)
            yield Ended(unit, run is not None)
        except SgLocalError as error:
            yield Ended(unit, True, error)
