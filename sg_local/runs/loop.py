"""The whole loop by one call, for the command line and for Python.

run("support-inbox", model="smollm2-135m").scores    {"base_few_shot": 0.34, ..., "tuned_merged": 0.71}
"""

from dataclasses import dataclass
from pathlib import Path

from sg_local.errors import WorseThanBase
from sg_local.progress import say
from sg_local.report.html import PAGE
from sg_local.report.page import write_report
from sg_local.report.scores import read_evaluation, worse_than
from sg_local.runs.begin import begin_run
from sg_local.runs.directory import Run
from sg_local.runs.fallback import hand_out
from sg_local.runs.handed_out import Fallback, read_fallback
from sg_local.runs.pipeline import run_pipeline
from sg_local.selfguide.evaluation import metric_mean
from sg_local.selfguide.metrics import METRICS
from sg_local.settings import STAGES, Settings
from sg_local.task import Task


@dataclass(frozen=True)
class Result:
    """A run as far as it was asked to go. The files are there, and the scores, unless `until` stopped before them."""

    run: Run

    @property
    def directory(self) -> Path:
        """The run's directory: its rows, its manifest, and the files below."""
        return self.run.path

    @property
    def adapter(self) -> Path:
        """The LoRA adapter as a GGUF, for llama.cpp beside the base."""
        return self.run.file("adapter.gguf")

    @property
    def model(self) -> Path:
        """Base and adapter in one GGUF."""
        return self.run.file("model.gguf")

    @property
    def modelfile(self) -> Path:
        """For `ollama create`."""
        return self.run.file("Modelfile")

    @property
    def page(self) -> Path:
        """The run as a page for the browser, where it could be written."""
        return self.run.file(PAGE)

    @property
    def scores(self) -> dict[str, float]:
        """Contender -> its mean by the task's metric, 0..1. Raises InputError where the run was not evaluated."""
        evaluation = read_evaluation(self.run)
        metric = METRICS[evaluation["metric"]]
        return {
            name: metric_mean(scores, metric)["mean"] for name, scores in evaluation["contenders"].items()
        }

    def hand_out_fallback(self) -> Fallback | None:
        """Hands out the base's best way where the tuned model is not better; None where that model is what to use.

        `predict` with the run's directory then answers in that way. Raises InputError where the run was not evaluated.
        """
        is_handed_out = hand_out(self.run)
        _write_page(self.run)
        return read_fallback(self.run) if is_handed_out else None

    def gate(self) -> None:
        """Raises WorseThanBase where the tuned model is significantly worse than the base at its best."""
        if opponent := worse_than(self.run):
            raise WorseThanBase(f"{self.run.path}: the tuned model is significantly worse than {opponent}")


def run(
    task: str | Path | Task,
    *,
    model: str | Path,
    settings: Settings | None = None,
    run_dir: str | Path | None = None,
    until: str = STAGES[-1],
) -> Result:
    """Makes data for the task with the model, finetunes the model on it, exports it as GGUF, and scores it.

    Called again with the same arguments, it goes on where it stopped; a finished run is only read. Each stage runs in
    a process of its own.

    task: a task file, the name of a shipped one, or a Task. model: a GGUF file, or a name of `sg-local models list`.
    settings: the defaults where none are given. run_dir: runs/<task name> where none is given. until: the last stage.

    Raises InputError where an argument or a file is wrong, or the directory belongs to another run, and SgLocalError
    where a stage fails; a note on it says what the stage said.
    """
    begun, is_new = begin_run(task, model, run_dir, settings or Settings())
    say(f"{'new run' if is_new else 'run'} {begun.path}: {begun.task.name} with {begun.model.path.name}")
    return finish(begun, until, run_pipeline(begun, until, tells_times=True))


def finish(run: Run, until: str, was_due: bool) -> Result:
    """The result of a run that went as far as `until`, with a page where all of it is finished.

    was_due: whether there was something to do.
    """
    if not was_due:
        say(f"{run.path} is finished{'' if until == STAGES[-1] else f' until {until}'}, nothing to do")
    elif until == STAGES[-1]:
        _write_page(run)
    return Result(run)


def _write_page(run: Run) -> None:
    try:
        write_report(run.path)
    except Exception as error:  # nothing is lost with the page, and all else is there
        say(f"no page was written ({error}): `sg-local report {run.path}` tries again")
