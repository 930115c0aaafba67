"""The runs under a directory, as lines to read.

run                          state         verdict  score    size     age  model
runs/support-inbox           finished      better   0.710  98 MiB  2 days  SmolLM2-135M-Instruct.Q4_1
runs/support-inbox-epochs=5  train failed  -            -   1 MiB   3 min  SmolLM2-135M-Instruct.Q4_1
runs/support-inbox-epochs=5: train failed: memory ran out
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TypedDict

from sg_local.escape import one_line
from sg_local.report import tables

HEADS = ("run", "state", "verdict", "score", "size", "age", "model")


class State(StrEnum):
    """What a run is at."""

    FINISHED = "finished"
    AT_WORK = "at work"
    FAILED = "failed"  # its stage said why
    STOPPED = "stopped"  # or killed, or not begun; or something was changed since
    DAMAGED = "damaged"


class RunItem(TypedDict):
    """One run, and how far it is."""

    run: str  # its directory
    task: str | None
    model: str  # its file's name
    state: State
    stage: str | None  # the first that is not finished
    reason: str | None  # why it is not finished, where that is known
    metric: str | None  # of the score and the verdict, where the run is finished
    score: float | None  # of model.gguf
    verdict: str | None  # against the base's best way
    handed_out: str | None  # what answers in place of the tuned model, by `run --fallback`
    size_bytes: int
    age_seconds: int  # since it was last written


def run_lines(items: Sequence[RunItem]) -> Iterator[str]:
    """A table with a line for each run, and below it why runs are not finished."""
    rows = [HEADS, *(tuple(map(one_line, _cells(item))) for item in items)]
    yield from tables.columns(rows, ("score", "size", "age"))
    for item in items:
        if item["reason"]:
            yield one_line(f"{item['run']}: {_state(item)}: {item['reason']}")
        if item["handed_out"]:
            yield one_line(f"{item['run']}: {item['handed_out']}")


def _cells(item: RunItem) -> tuple[str, ...]:
    return (
        item["run"],
        _state(item),
        item["verdict"] or "-",
        "-" if item["score"] is None else tables.score(item["score"]),
        tables.size(item["size_bytes"]),
        tables.age(item["age_seconds"]),
        item["model"].removesuffix(".gguf"),
    )


def _state(item: RunItem) -> str:
    match item["state"], item["stage"]:
        case State.AT_WORK, str(stage):
            return f"{stage} at work"
        case State.FAILED, str(stage):
            return f"{stage} failed"
        case State.STOPPED, str(stage):
            return f"{stage} to do"
    return str(item["state"])
