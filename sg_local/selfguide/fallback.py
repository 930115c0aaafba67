"""Which way of the base to hand out where the tuned model is not better than the base at its best.

    choice_of(evaluation)    FallbackChoice(way="base_label_scoring", in_chat="base_few_shot")
                             None: the tuned model scored higher, or nothing tells which is right more often

The means decide, not the verdict: where no difference is shown, the higher mean is the better guess, and the base's
best way was chosen on the same rows, which favours the base. Equal means go to the base, which is as good untrained.
Held-out made rows decide nothing: what counts as right there is what the base answered itself.
"""

from typing import NamedTuple

from sg_local.selfguide.contenders import CONTENDERS, OPPONENTS, TUNED, Contender
from sg_local.selfguide.evaluation import Evaluation, gain_over_best, is_accuracy, metric_mean
from sg_local.selfguide.metrics import METRICS


class FallbackChoice(NamedTuple):
    """The base's best way, and the best one that a chat program can do; None where the tuned model beats those."""

    way: Contender
    in_chat: Contender | None


def choice_of(evaluation: Evaluation) -> FallbackChoice | None:
    """What to hand out in place of the tuned model; None where that is as good a guess, or better."""
    best = gain_over_best(evaluation)
    if not is_accuracy(evaluation) or best["mean"] > 0 or best["over"] not in CONTENDERS:
        return None
    tuned = mean(evaluation, TUNED)
    # Chat programs write answers; none of them compares the probabilities of labels.
    in_chat = [
        opponent
        for opponent in OPPONENTS
        if opponent != Contender.LABEL_SCORING
        and opponent in evaluation["contenders"]
        and mean(evaluation, opponent) >= tuned
    ]
    way = CONTENDERS[best["over"]]
    if way in in_chat:
        return FallbackChoice(way, way)
    return FallbackChoice(way, max(in_chat, key=lambda one: mean(evaluation, one), default=None))


def mean(evaluation: Evaluation, contender: str) -> float:
    """A contender's mean by the task's metric."""
    return metric_mean(evaluation["contenders"][contender], METRICS[evaluation["metric"]])["mean"]
