"""What `run --fallback` handed out in place of a tuned model that is not better: fallback/ in a run's directory.

    runs/inbox/fallback/way.json    {"way": "base_few_shot", "in_chat": "base_few_shot", "score": 0.48, ...}
    runs/inbox/fallback/Modelfile   chat_template.jinja    where a chat program can answer in that way, or a next best

It holds for the scores that it was decided by, and for the files as they were written.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypedDict, cast

from sg_local.errors import InputError
from sg_local.files import read_json, sha256_file
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import CONTENDERS, OPPONENTS, Contender
from sg_local.task import Example

DIRECTORY = "fallback"
WAY_FILE = f"{DIRECTORY}/way.json"
CHAT_TEMPLATE, MODELFILE = f"{DIRECTORY}/chat_template.jinja", f"{DIRECTORY}/Modelfile"
MAX_BYTES = 16 << 20  # many examples may be in it


class Way(TypedDict):
    """way.json."""

    way: str  # the contender that answers in place of the tuned model
    in_chat: str | None  # the one for chat programs, with these files; None where model.gguf scored higher
    score: float
    in_chat_score: float | None
    tuned_score: float
    metric: str
    rows_from: str
    examples: list[dict[str, str]]  # in the prompt of `way`
    evaluation_sha256: str  # of the scores that decided
    sha256: dict[str, str]  # of the files beside


class Fallback(NamedTuple):
    """What answers in place of the tuned model."""

    way: Contender
    in_chat: Contender | None
    examples: tuple[Example, ...]
    told: Way


def read_fallback(run: Run) -> Fallback | None:
    """What was handed out; None where nothing was, or it was by other scores than the run's.

    Raises InputError where the file is damaged.
    """
    path = run.file(WAY_FILE)
    if not path.exists():
        return None
    told = read_json(path, MAX_BYTES)
    if not _is_way(told) or (told["way"] == Contender.LABEL_SCORING and not run.task.labels):
        raise InputError(f"{path} is damaged: `sg-local run` with --fallback makes it anew")
    told = cast(Way, told)
    if told["evaluation_sha256"] != run.manifest()["stages"].get("evaluate", {}).get("writes", {}).get(
        "evaluation.json"
    ):
        return None
    in_chat = told["in_chat"]
    return Fallback(
        CONTENDERS[told["way"]],
        CONTENDERS[in_chat] if in_chat else None,
        tuple(Example(row["input"], row["output"]) for row in told["examples"]),
        told,
    )


def faults_of(run: Run, fallback: Fallback) -> Iterator[str]:
    """Which of the files that were handed out are not as they were written."""
    for name, sha256 in fallback.told["sha256"].items():
        if not run.file(name).is_file() or sha256_file(run.file(name)) != sha256:
            yield f"{run.file(name)} is not what --fallback wrote: `sg-local run` with --fallback writes it anew"


def _is_way(value: object) -> bool:
    match value:
        case {
            "way": str(way),
            "in_chat": str() | None as in_chat,
            "score": int() | float(),
            "in_chat_score": int() | float() | None,
            "tuned_score": int() | float(),
            "metric": str(),
            "rows_from": str(),
            "examples": list(examples),
            "evaluation_sha256": str(),
            "sha256": dict(sha256),
        }:
            # Chat programs write answers; none of them compares the probabilities of labels.
            return (
                way in OPPONENTS
                and (in_chat is None or (in_chat in OPPONENTS and in_chat != Contender.LABEL_SCORING))
                and all(
                    isinstance(row, dict)
                    and row.keys() == {"input", "output"}
                    and all(isinstance(text, str) for text in row.values())
                    for row in examples
                )
                and sha256.keys() <= {CHAT_TEMPLATE, MODELFILE}
                and all(isinstance(text, str) for text in sha256.values())
            )
    return False
