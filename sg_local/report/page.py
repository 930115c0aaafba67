"""The page of a run: one HTML file that asks for nothing else, to be read with the network off, shared, or printed.

    write_report("runs/support-inbox")   -> runs/support-inbox/report.html, under 2 MB

Scores and what they rest on, test rows that training fixed or broke, the made rows and why others were dropped, the
loss, the proof, and where all of it comes from. A part whose stage is not finished is left out, and the page says so.
What the page shows is computed in page_data.py, drawn in charts.py, and laid out in page.html.j2.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from sg_local.errors import InputError
from sg_local.files import read_rows, write_text
from sg_local.report import page_data as data
from sg_local.report import tables
from sg_local.report.explain import has_label_scores
from sg_local.report.fallback import in_words
from sg_local.report.html import PAGE, small_page
from sg_local.report.made_data import data_report
from sg_local.report.page_data import Change, Kind
from sg_local.report.review import review_lines
from sg_local.report.scores import read_evaluation, read_predictions
from sg_local.runs.directory import Run, open_run
from sg_local.runs.handed_out import read_fallback
from sg_local.runs.review import read_review, summary_of
from sg_local.runs.rows import known_labels
from sg_local.selfguide.contenders import BASELINE, CONTENDERS, TUNED, Contender
from sg_local.selfguide.evaluation import (
    Evaluation,
    PredictionRow,
    calibration_in,
    gain_over_best,
    gains,
    matched_reference,
    metric_mean,
    metrics_of,
)
from sg_local.selfguide.forecast import Forecast, forecast_line
from sg_local.selfguide.given import made_like_real
from sg_local.selfguide.metrics import METRICS
from sg_local.selfguide.rows import InputRow, OutputRow, PairRow, Source, is_kept, source_of
from sg_local.selfguide.selection import in_turns
from sg_local.selfguide.statistics import Verdict
from sg_local.settings import STAGES

Part = dict[str, Any]  # what the template shows of one part of the page


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run, and returns where: `out`, or report.html in the run's directory.

    Raises InputError where the directory is no run, or a file that is to be shown is not as its stage wrote it.
    """
    path = Path(out) if out is not None else Path(run_dir) / PAGE
    write_text(path, page_of(open_run(Path(run_dir))))
    return path


def page_of(run: Run) -> str:
    """The page as HTML. Of a run with very long or very many rows, it shows less of each, and says so."""
    return small_page("page.html.j2", page_parts(run))


def page_parts(run: Run) -> dict[str, Any]:
    """Everything that the page shows; None for a part whose stage is not finished."""
    stages = run.manifest()["stages"]
    unfinished = run.first_unfinished()
    evaluation = read_evaluation(run) if "evaluate" in stages else None
    shown = data.shown_labels([row.output for row in run.test_rows], run.task.labels)
    return {
        "run": run,
        "unfinished": f"{unfinished.stage} {unfinished.reason}" if unfinished else "",
        "scores": _scores(run, evaluation) if evaluation else None,
        "changes": _changes(run, evaluation, shown) if evaluation else None,
        "made": _made(run, shown) if "curate" in stages else None,
        "forecast": _forecast(stages["curate"].get("forecast")) if "curate" in stages else "",
        "review": _review(run) if "curate" in stages else None,
        "training": _training(stages["train"]) if "train" in stages else None,
        "proof": _proof(stages["export"].get("parity")) if "export" in stages else None,
        "stages": [
            {"name": name, **_cost(stages[name]), "writes": stages[name]["writes"]}
            for name in STAGES
            if name in stages
        ],
        "versions": _versions(stages),
        "settings": data.changed_settings(run.settings),
        "given": {name: entry["given"] for name, entry in stages.items() if entry.get("given")},
    }


def _scores(run: Run, evaluation: Evaluation) -> Part:
    from sg_local.report.charts import interval_chart

    metric, best = METRICS[evaluation["metric"]], gain_over_best(evaluation)
    contenders = evaluation["contenders"]
    means = {name: metric_mean(scores, metric) for name, scores in contenders.items()}
    metrics = metrics_of(evaluation)
    fallback = read_fallback(run)
    return {
        "handed_out": fallback and in_words(fallback),
        "sentence": data.verdict_sentence(evaluation),
        "verdict": best["verdict"],
        "gain": data.gain_sentence(best),
        "gains": [
            {**gain, "over": data.heading(gain["over"])}
            for gain in {gain["over"]: gain for gain in (*gains(evaluation).values(), best)}.values()
        ],
        "n_rows": evaluation["n_rows"],
        "rows_from": evaluation["rows_from"],
        "metrics": metrics,
        "contenders": [
            {
                "heading": data.heading(name),
                "key": name,
                "means": [metric_mean(scores, item) for item in metrics],
                "no_label_share": scores.get("no_label_share"),
                "label_distance": scores.get("label_distance"),
            }
            for name, scores in contenders.items()
        ],
        "chart": interval_chart(
            [(data.heading(name), mean["mean"], mean["interval_95"]) for name, mean in means.items()],
            f"{metric.heading}, with 95 % interval",
            "scores",
            {Contender.TUNED_ADAPTER.heading, TUNED.heading},
        ),
    }


def _changes(run: Run, evaluation: Evaluation, shown: Sequence[str]) -> Part:
    """The tuned model's answers beside those of the base's best way, which the verdict is about."""
    over = gain_over_best(evaluation)["over"]
    opponent = CONTENDERS.get(over, BASELINE)
    metric = METRICS[evaluation["metric"]]
    before, after = (read_predictions(run, contender) for contender in (opponent, TUNED))
    try:
        rows = data.changes(before, after, metric)
    except ValueError as error:
        raise InputError(
            f"{run.path}: {opponent} answers other rows than {TUNED}: `sg-local evaluate {run.path} --redo`"
        ) from error
    kinds = [kind for kind in Kind if any(row.kind == kind for row in rows)]
    part: Part = {
        "before": opponent.heading,
        "rows": _changed_first(rows),
        "kinds": {kind: sum(row.kind == kind for row in rows) for kind in kinds},
        "scored": metric.heading if Kind.FIXED not in kinds and Kind.RIGHT not in kinds else "",
    }
    if labels := run.task.labels:
        part |= _sureness(evaluation, after)
        part["confusions"] = {
            f"before: {opponent.heading}": data.confusion(before, labels, shown),
            f"after: {TUNED.heading}": data.confusion(after, labels, shown),
        }
        part |= _distribution(
            labels,
            shown,
            {
                "truth": [matched_reference(row) for row in after],
                "before": [row["prediction"] for row in before],
                "after": [row["prediction"] for row in after],
            },
        )
    return part


def _changed_first(rows: Sequence[Change]) -> list[Change]:
    """The rows to read: one broken and one fixed in turn, the largest differences first; then the others."""
    order = (Kind.BROKEN, Kind.WORSE, Kind.FIXED, Kind.BETTER, Kind.WRONG, Kind.EQUAL, Kind.RIGHT)
    ordered = sorted(rows, key=lambda row: (-abs(row.score_after - row.score_before), order.index(row.kind)))
    changed = [row for row in ordered if row.score_after != row.score_before]
    others = [row for row in ordered if row.score_after == row.score_before]
    return [changed[place] for place in in_turns([row.kind for row in changed])] + others


def _distribution(labels: Sequence[str], shown: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Part:
    from sg_local.report.charts import share_chart

    shares = {name: data.label_shares(texts, labels, shown) for name, texts in answers.items()}
    names = [*shown, *([data.OTHER_LABELS] if len(shown) < len(labels) else [])]
    return {
        "labels": names,
        "shares": shares,
        "label_chart": share_chart(names, shares, "share of the test rows", "labels"),
    }


def _sureness(evaluation: Evaluation, rows: Sequence[PredictionRow]) -> Part:
    """How right the tuned model is where it is sure, as far as its label probabilities were recorded."""
    from sg_local.report.charts import coverage_chart, reliability_chart

    bins, calibration = data.answer_reliability(rows), calibration_in(evaluation, TUNED)
    return {
        "bins": bins,
        "reliability_chart": reliability_chart(bins, "share that is right", "sureness") if bins else "",
        "calibration": calibration,
        "coverage_chart": coverage_chart(calibration["risk_coverage"], "coverage") if calibration else "",
    }


def _made(run: Run, shown: Sequence[str]) -> Part:
    from sg_local.report.charts import count_chart, length_chart

    inputs = read_rows(run.written_file("inputs.jsonl"), InputRow)
    pairs = read_rows(run.written_file("train.jsonl"), PairRow)
    of_inputs = {row["id"] for row in inputs}
    outputs = [
        row for row in read_rows(run.written_file("outputs.jsonl"), OutputRow) if row["id"] in of_inputs
    ]
    labelled = {row["id"] for row in inputs if source_of(row) == Source.LABELLED}
    report = data_report(
        [row for row in inputs if row["id"] not in labelled],
        [row for row in outputs if row["id"] not in labelled],
        pairs,
        run.task,
    )
    dropped = data.drops(report, run.settings, shown)
    rows = data.made_rows(inputs, outputs, pairs)
    by_source = {
        "made, kept": [
            row["input"]
            for row in pairs
            if is_kept(row) and row["id"] in of_inputs and source_of(row) == Source.MADE
        ],
        "given": [row["input"] for row in inputs if source_of(row) == Source.GIVEN],
        "test": [row.input for row in run.test_rows],
    }
    texts = {name: found for name, found in by_source.items() if found}
    return {
        "report": report,
        "asked_for": report["attempts"] - report.get("given", 0),
        "drops": dropped,
        "labels": shown,
        "rows": rows,
        "has_real": bool({row.source for row in rows} & {Source.GIVEN, Source.LABELLED}),
        "outcomes": list(dict.fromkeys(row.outcome for row in rows)),
        "funnel_chart": count_chart(
            [
                ("inputs", report["attempts"]),
                *((item.reason, item.n_rows) for item in dropped),
                ("kept", report["kept"]),
            ],
            "rows",
            "funnel",
        ),
        "length_chart": length_chart(texts, "lengths") if texts else "",
        "varieties": data.varieties(texts),
        **_annotation(run, inputs, outputs),
    }


def _annotation(run: Run, inputs: Sequence[InputRow], outputs: Sequence[OutputRow]) -> Part:
    """How sure the base was of the labels of made inputs, and how often these are what the inputs were made for."""
    from sg_local.report.charts import reliability_chart

    whole = [row for row in outputs if row["drop"] is None and has_label_scores(row, run.task.labels)]
    others = {row["id"] for row in inputs if source_of(row) == Source.LABELLED} | made_like_real(inputs)
    scored = [row for row in whole if row["id"] not in others]
    bins = data.annotation_reliability(
        scored,
        {row["id"]: row["label"] for row in inputs},
        run.task.labels,
        run.settings.calibrate,
        known_labels(run, inputs, whole, [row["id"] for row in scored]),
    )
    chart = reliability_chart(bins, "share made for it", "reliability") if bins else ""
    return {"bins": bins, "reliability_chart": chart}


def _forecast(entry: object) -> str:
    """What was foreseen of the training; "" where nothing was, or another version wrote it otherwise."""
    if not isinstance(entry, dict) or {*_numbers(entry), "verdict"} != Forecast.__required_keys__:
        return ""
    return forecast_line(cast(Forecast, entry)) if entry.get("verdict") in set(Verdict) else ""


def _review(run: Run) -> Part | None:
    """What a person said of rows; None where nobody said anything."""
    inputs = read_rows(run.written_file("inputs.jsonl"), InputRow)
    if not (words := read_review(run, inputs)):
        return None
    pairs = read_rows(run.written_file("train.jsonl"), PairRow)
    rows = data.reviewed_rows(words.values(), inputs)
    return {
        "lines": review_lines(summary_of(run, words, pairs)),
        "rows": rows,
        "words": list(dict.fromkeys(row.word for row in rows)),
    }


def _training(entry: Mapping[str, Any]) -> Part:
    from sg_local.report.charts import loss_chart

    recorded = entry.get("training")
    recorded = recorded if isinstance(recorded, dict) else {}
    losses = recorded.get("losses")
    is_whole = isinstance(losses, list) and losses and all(map(_is_number, losses))
    counts = entry.get("counts")
    return {
        "numbers": _numbers({key: recorded.get(key) for key in ("steps", "first_loss", "last_loss")}),
        "tokens": _numbers({key: recorded.get(key) for key in ("rows_tokens", "computed_tokens")}),
        "rows": _numbers(counts).get("rows"),
        "device": device if isinstance(device := recorded.get("device"), str) else "",
        "chart": loss_chart(cast(list[float], losses), "loss") if is_whole else "",
    }


def _proof(parity: object) -> Part | None:
    if not isinstance(parity, dict) or not (numbers := _numbers(parity)):
        return None
    merged_type = parity.get("merged_type")
    return {**numbers, "type": merged_type if isinstance(merged_type, str) else ""}


def _numbers(values: object) -> dict[str, float | int]:
    """The numbers of a part of the manifest, which another version may have written."""
    if not isinstance(values, dict):
        return {}
    return {key: cast(float, value) for key, value in values.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cost(entry: Mapping[str, Any]) -> Part:
    found = _numbers({key: entry.get(key) for key in ("seconds", "peak_memory_bytes")})
    memory = found.get("peak_memory_bytes")
    return {"seconds": found.get("seconds"), "memory": tables.size(int(memory)) if memory else ""}


def _versions(stages: Mapping[str, Any]) -> dict[str, str]:
    """Package -> its version; several where stages ran with different ones."""
    found: dict[str, list[str]] = {}
    for entry in stages.values():
        versions = entry.get("versions")
        for name, version in versions.items() if isinstance(versions, dict) else ():
            if version not in (seen := found.setdefault(str(name), [])):
                seen.append(version)
    return {name: ", ".join(map(str, versions)) for name, versions in found.items()}
