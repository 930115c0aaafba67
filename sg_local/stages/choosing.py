"""The answer of each annotated input, and which of them are sure enough to train on (SELF-GUIDE, section 3.2).

    {"id": 7, "drop": null, "label_logprobs": [{"delivery": -0.4, "refund": -1.9}, ...]}   OutputRow
 -> {"id": 7, "input": "My parcel is late.", "output": "delivery", "confidence": 0.81, "drop": null, ...}   PairRow

Labels are chosen by calibrated scores or by votes; what an input was made for is evidence for its label, or a filter.
Free answers are chosen by what samples agree on, or by how much the input tells about them. The least sure are dropped.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from sg_local.escape import one_line
from sg_local.progress import say
from sg_local.runs.directory import Run
from sg_local.runs.rows import known_labels
from sg_local.selfguide.filters import answer_fault, rules_of
from sg_local.selfguide.forecast import Forecast, forecast
from sg_local.selfguide.given import made_like_real
from sg_local.selfguide.labels import (
    Agreement,
    Known,
    Probabilities,
    agreement_by_chance,
    are_unequal,
    follows_labels,
    label_scores,
    margin,
    sharpened,
)
from sg_local.selfguide.metrics import normalize
from sg_local.selfguide.rows import (
    DropReason,
    InputRow,
    OutputRow,
    PairRow,
    Source,
    is_kept,
    source_of,
)
from sg_local.selfguide.selection import (
    answer_confidences,
    most_confident,
    repeated_answers,
    source_to_leave_out,
    vote_margin,
)


class LabelFit(TypedDict, total=False):
    """How well labels fit what inputs were made for, as the manifest has it; empty where none was made for a label."""

    agreement: Agreement
    forecast: Forecast


class _Answered(NamedTuple):
    """A pair with the answers that it is chosen from, and the label that its input was made for."""

    pair: PairRow
    output: OutputRow
    made_for: str | None


class _Found(NamedTuple):
    """What choosing the labels says of all rows together."""

    agreed: int  # rows whose label, before evidence, is the one that they were made for
    reliability: float | None = None  # None where votes choose
    real_kappa: float | None = None
    forecast: Forecast | None = None


def choose_pairs(
    run: Run, inputs: Sequence[InputRow], all_outputs: Sequence[OutputRow]
) -> tuple[list[PairRow], LabelFit]:
    """The answered inputs with what is chosen and dropped, and how well they fit their made-for labels."""
    by_id = {row["id"]: row for row in inputs}
    outputs = [row for row in all_outputs if source_of(by_id[row["id"]]) != Source.LABELLED]
    pairs: list[PairRow] = [
        {
            "id": row["id"],
            "input": by_id[row["id"]]["input"],
            "output": row["output"],
            "confidence": None,
            "targets": None,
            "copies": 1,
            "drop": row["drop"],
            "source": source_of(by_id[row["id"]]),
        }
        for row in outputs
    ]
    same = made_like_real(inputs)
    for pair in pairs:
        if pair["drop"] is None and pair["id"] in same:
            pair["drop"] = DropReason.DUPLICATE
    fit: LabelFit = {}
    if run.task.is_classification:
        known = known_labels(run, inputs, all_outputs, [pair["id"] for pair in pairs if pair["drop"] is None])
        fit = _choose_labels(run, pairs, outputs, [by_id[row["id"]]["label"] for row in outputs], known)
    else:
        _choose_answers(run, pairs, outputs)
    return pairs, fit


def _choose_labels(
    run: Run,
    pairs: Sequence[PairRow],
    outputs: Sequence[OutputRow],
    made_for: Sequence[str | None],
    known: Known,
) -> LabelFit:
    """Labels by their scores or votes; drops what disagrees or is unsure. Returns how well made-for labels fit."""
    by_scores = run.settings.label_answers == "scores"
    if not by_scores:
        _choose_voted_labels(run, pairs, outputs)
    answered = [
        _Answered(pair, output, label)
        for pair, output, label in zip(pairs, outputs, made_for, strict=True)
        if pair["drop"] is None
    ]
    if not answered:
        return {}
    if by_scores:
        found = _choose_scored_labels(run, answered, known)
    else:
        found = _Found(sum(pair["output"] == label for pair, _, label in answered))
    _say_unequal_labels(run, pairs)
    fit = _label_fit(run, answered, found)
    agreement = fit.get("agreement")
    if agreement and agreement["used_as_filter"]:
        for pair, _, label in answered:
            if label is not None and pair["output"] != label:
                pair["drop"] = DropReason.DISAGREEMENT
    _leave_out_a_source(run, pairs, agreement["p"] if agreement else 1.0, found.real_kappa)
    _drop_least_confident(run, pairs, by_label=True)
    return fit


def _choose_scored_labels(run: Run, answered: Sequence[_Answered], known: Known) -> _Found:
    """Gives each pair its likeliest label by the scores."""
    scores = label_scores(
        [output["label_logprobs"] for _, output, _ in answered],
        [label for _, _, label in answered],
        run.task.labels,
        removes_bias=run.settings.calibrate,
        weighs_evidence=run.settings.agreement == "evidence",
        known=known,
    )
    _take_likeliest(run, [pair for pair, _, _ in answered], scores.last)
    foreseen = _forecast(run, answered, scores.before_evidence)
    return _Found(scores.agreed, scores.reliability, scores.real_kappa, foreseen)


def _label_fit(run: Run, answered: Sequence[_Answered], found: _Found) -> LabelFit:
    """How well labels fit what inputs were made for, and whether those that do not are dropped."""
    n_labels, n_made_for = len(run.task.labels), sum(label is not None for _, _, label in answered)
    if n_made_for == 0:
        return {}
    use = run.settings.agreement
    follows = follows_labels(found.agreed, n_made_for, n_labels)
    fit: LabelFit = {
        "agreement": {
            "share": round(found.agreed / n_made_for, 4),
            "n_rows": n_made_for,
            "chance": round(1 / n_labels, 4),
            "p": float(f"{agreement_by_chance(found.agreed, n_made_for, n_labels):.3g}"),
            "reliability": round(1 / n_labels if found.reliability is None else found.reliability, 4),
            "used_as_filter": use == "always" or (use == "auto" and follows),
        }
    }
    if found.forecast:
        fit["forecast"] = found.forecast
    return fit


def _leave_out_a_source(run: Run, pairs: Sequence[PairRow], agreement_p: float, kappa: float | None) -> None:
    """Drops real rows, or made ones, where the student cannot tell their labels and the others are enough."""
    counts = Counter(source_of(pair) for pair in pairs if is_kept(pair))
    source = source_to_leave_out(
        counts[Source.MADE], counts[Source.GIVEN], run.settings.n_inputs, agreement_p, kappa
    )
    if source is None or run.settings.agreement == "never":
        return
    reason = DropReason.PROMPTS_DIFFER if source == Source.GIVEN else DropReason.BY_CHANCE
    for pair in pairs:
        if is_kept(pair) and source_of(pair) == source:
            pair["drop"] = reason
    if source == Source.GIVEN:
        say(
            f"curate: the prompts that score labels hardly agree on real inputs (kappa {kappa:.2f}), so their labels "
            "would be chance and they are left out; rows that you label, or answer in `sg-local review`, count"
        )
    else:
        say(
            f"curate: made inputs fit what they were made for as by chance (p = {agreement_p:.2g}), so they are left "
            "out, and real ones alone are trained on"
        )


def _forecast(run: Run, answered: Sequence[_Answered], scores: Probabilities) -> Forecast | None:
    """What the chosen labels and the base's few-shot answers foresee; scores: of the labels, before evidence."""
    # The first prompt is that of few-shot prompting (prompts.py).
    first = [output["label_logprobs"][0] for _, output, _ in answered]
    return forecast(
        [max(prompt, key=lambda label: prompt[label]) for prompt in first],
        [run.task.labels[row.index(max(row))] for row in scores],
        [label for _, _, label in answered],
    )


def _take_likeliest(run: Run, pairs: Sequence[PairRow], probabilities: Probabilities) -> None:
    """Gives each pair its likeliest label, the margin as confidence, and the targets that are asked for."""
    labels = run.task.labels
    for pair, row in zip(pairs, probabilities, strict=True):
        pair["output"] = labels[row.index(max(row))]
        pair["confidence"] = round(margin(row), 4)
        if run.settings.label_targets == "soft":
            shares = sharpened(row, run.settings.soft_temperature)
            pair["targets"] = {label: round(share, 4) for label, share in zip(labels, shares, strict=True)}


def _choose_voted_labels(run: Run, pairs: Sequence[PairRow], outputs: Sequence[OutputRow]) -> None:
    """Labels as the samples voted; drops what is no label, or was not agreed on."""
    labels = {normalize(label): label for label in run.task.labels}
    for pair, output in zip(pairs, outputs, strict=True):
        if pair["drop"] is not None or pair["output"] is None:
            continue
        label = labels.get(normalize(pair["output"]))
        pair["confidence"] = round(vote_margin(output["samples"]), 4)
        if label is None:
            pair["drop"] = DropReason.NO_LABEL
            continue
        pair["output"] = label
        if output["share"] < run.settings.min_share:
            pair["drop"] = DropReason.LOW_SHARE


def _choose_answers(run: Run, pairs: Sequence[PairRow], outputs: Sequence[OutputRow]) -> None:
    """Drops answers that are noise, of another form than the examples', not agreed on, or unsure."""
    settings, rules = run.settings, rules_of(run.task)
    answered = [
        (pair, output)
        for pair, output in zip(pairs, outputs, strict=True)
        if pair["drop"] is None and pair["output"] is not None
    ]
    if settings.choose_by == "information":
        texts = [pair["input"] for pair, _ in answered]
        said = repeated_answers(settings, rules, texts, [output for _, output in answered])
        for (pair, _), answer in zip(answered, said or (), strict=bool(said)):
            pair["output"] = answer
    confidences = answer_confidences(
        [{**output, "output": pair["output"]} for pair, output in answered], settings.choose_by
    )
    for (pair, output), confidence in zip(answered, confidences, strict=True):
        pair["confidence"] = round(confidence, 4)
        pair["drop"] = answer_fault(settings, rules, pair["input"], str(pair["output"]))
        # Samples of a high temperature agree little, and the choice by information does not rest on it.
        by_agreement = settings.choose_by != "information"
        if pair["drop"] is None and by_agreement and output["share"] < settings.min_share:
            pair["drop"] = DropReason.LOW_SHARE
    _drop_least_confident(run, pairs, by_label=False)


def _drop_least_confident(run: Run, pairs: Sequence[PairRow], *, by_label: bool) -> None:
    """Keeps the share keep_confident of the rows that are not dropped, of each label where there are labels.

    Real and made rows are taken apart: the confidence of one says nothing beside that of the other.
    """
    shares = dict.fromkeys(Source, run.settings.keep_confident)
    if by_label:
        shares[Source.GIVEN] = run.settings.keep_confident_real
    for source, share in shares.items():
        kept = [pair for pair in pairs if is_kept(pair) and source_of(pair) == source]
        is_confident = most_confident(
            [str(pair["output"]) if by_label else "" for pair in kept],
            [pair["confidence"] for pair in kept],
            share,
        )
        for pair, stays in zip(kept, is_confident, strict=True):
            if not stays:
                pair["drop"] = DropReason.LOW_CONFIDENCE


def _say_unequal_labels(run: Run, pairs: Sequence[PairRow]) -> None:
    """Says it where real inputs speak clearly against labels that are equally frequent."""
    answers = [pair["output"] for pair in pairs if is_kept(pair) and source_of(pair) == Source.GIVEN]
    if run.task.shares or not are_unequal(answers, run.task.labels):
        return
    counts = ", ".join(f"{one_line(label)} {count}" for label, count in Counter(answers).most_common(5))
    say(
        f"curate: real inputs were annotated unequally ({counts}), and labels are taken to occur equally often: where "
        "they do not, write `shares` into the task"
    )
