"""The runs under a directory: how far each is, what it scored, how large and how old it is. Only reads.

list_runs(Path("."))
-> [{"run": "runs/inbox", "task": "inbox", "model": "SmolLM2-135M-Instruct.Q4_1.gguf", "state": "finished",
     "stage": None, "reason": None, "metric": "exact_match", "score": 0.71, "verdict": "better", ...}]
"""

from collections.abc import Iterator
from pathlib import Path

from sg_local.errors import InputError
from sg_local.plan.store import RunHere, is_at_work, runs_under, size_and_age
from sg_local.report.fallback import in_words
from sg_local.report.run_list import RunItem, State
from sg_local.report.scores import read_evaluation
from sg_local.runs.directory import NOT_FINISHED, open_run
from sg_local.runs.handed_out import read_fallback
from sg_local.runs.process import reason_of_failure
from sg_local.selfguide.contenders import TUNED
from sg_local.selfguide.evaluation import gain_over_best, metric_mean
from sg_local.selfguide.metrics import METRICS


def list_runs(directory: Path) -> Iterator[RunItem]:
    """The runs under a directory, some levels deep, in the order of their paths.

    Raises InputError where there is no such directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory} is no directory: give one that has runs below it")
    return (_item(directory / here.path, here) for here in runs_under(directory))


def _item(path: Path, here: RunHere) -> RunItem:
    size_bytes, age_seconds = size_and_age(path)
    item: RunItem = {
        "run": str(path),
        "task": None,
        "model": here.model_path.name,
        "state": State.DAMAGED,
        "stage": None,
        "reason": None,
        "metric": None,
        "score": None,
        "verdict": None,
        "handed_out": None,
        "size_bytes": size_bytes,
        "age_seconds": age_seconds,
    }
    try:
        _add_progress(item, path)
    except InputError as error:
        item["state"], item["reason"] = State.DAMAGED, str(error)
    return item


def _add_progress(item: RunItem, path: Path) -> None:
    """Says how far a run is, and what came of it. Raises InputError where it is damaged."""
    run = open_run(path)
    item["task"] = run.task.name
    unfinished = run.first_unfinished()
    if is_at_work(path):
        item["state"], item["stage"] = State.AT_WORK, unfinished.stage if unfinished else None
    elif unfinished:
        why = reason_of_failure(run)
        item["state"], item["stage"] = State.FAILED if why else State.STOPPED, unfinished.stage
        item["reason"] = why or (None if unfinished.reason == NOT_FINISHED else unfinished.reason)
    else:
        evaluation = read_evaluation(run)
        metric = METRICS[evaluation["metric"]]
        item["state"], item["metric"] = State.FINISHED, metric
        item["score"] = metric_mean(evaluation["contenders"][TUNED], metric)["mean"]
        item["verdict"] = gain_over_best(evaluation)["verdict"]
        fallback = read_fallback(run)
        item["handed_out"] = fallback and in_words(fallback)
