"""What `run --fallback` handed out, as lines to read.

in_words(fallback)     the base by label scoring answers in place of the tuned model: it scored 0.480, model.gguf 0.460
chat_note(fallback)    no chat program compares the probabilities of labels: `sg-local predict` does; ...
"""

from sg_local.report import tables
from sg_local.runs.handed_out import Fallback
from sg_local.selfguide.contenders import Contender


def in_words(fallback: Fallback) -> str:
    """What answers, and by which scores."""
    told = fallback.told
    return (
        f"the base by {_named(fallback.way)} answers in place of the tuned model: it scored "
        f"{tables.score(told['score'])}, model.gguf {tables.score(told['tuned_score'])}"
    )


def chat_note(fallback: Fallback) -> str | None:
    """What a chat program can do, where that is not the same."""
    told, scored = fallback.told, fallback.told["in_chat_score"]
    if fallback.way == Contender.LABEL_SCORING:
        note = "no chat program compares the probabilities of labels: `sg-local predict` does"
        if fallback.in_chat is None or scored is None:
            return f"{note}; for chat programs model.gguf, which scored {tables.score(told['tuned_score'])}"
        return f"{note}; for chat programs {_named(fallback.in_chat)}, which scored {tables.score(scored)}"
    if fallback.way == Contender.FIRST_LINE:
        return "the first line of each answer counts: the Modelfile ends answers there, and so does `sg-local predict`"
    return None


def _named(contender: Contender) -> str:
    return {Contender.FIRST_LINE: "few-shot's first line"}.get(contender, contender.heading)
