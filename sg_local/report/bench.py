"""Scores of many tasks as one table: a row for each task, means and an interval over the tasks of a kind.

    row_of(run's evaluation, run's manifest)
    -> {"task": "task190", "kind": "classification", "n_rows": 300, "minutes": 11.2,
        "scores": {"base_few_shot": 0.31, "base_label_scoring": 0.40, "tuned_merged": 0.52},
        "gain": {"mean": 0.21, "interval_95": [0.14, 0.28], "p": 3e-08, "verdict": "better"},
        "gain_over_best": {"over": "base_label_scoring", "mean": 0.12, ...}}

Layout: what SELF-GUIDE (arXiv 2407.12874, section 4) tells of its tasks, with the interval and the test beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

from sg_local.errors import SgLocalError
from sg_local.escape import markdown as text
from sg_local.report import ablation, tables
from sg_local.report.ablation import AblationRow, Seeds, SwitchSummary
from sg_local.selfguide.contenders import BASELINE, OPPONENTS, TUNED, Contender
from sg_local.selfguide.evaluation import Evaluation, Gain, gain_over_best, gains, metric_mean
from sg_local.selfguide.forecast import Forecast
from sg_local.selfguide.metrics import CLASSIFICATION, METRIC_OF_KIND, METRICS
from sg_local.selfguide.statistics import MeanOverTasks, Verdict, average, mean_over_tasks


class Agreement(TypedDict):
    """In the made data: how often the label fits what an input was made for, and how often by chance."""

    share: float
    chance: float


class BenchRow(TypedDict):
    """A finished task; gains over opponents of some runs or kinds of tasks stand beside these."""

    task: str
    kind: str
    n_rows: int
    minutes: float
    merged_type: NotRequired[str]
    too_coarse: NotRequired[str]  # the base's type, where the merged file has another
    scores: dict[str, float]
    gain: Gain
    gain_over_best: Gain
    # Of a task with labels, of the base and the tuned model:
    no_label_share: NotRequired[dict[str, float]]
    label_distance: NotRequired[dict[str, float]]
    agreement: NotRequired[Agreement | None]
    forecast: NotRequired[Forecast | None]  # of runs that are older: none


class Foreseen(TypedDict):
    """Gains over few-shot prompting that were foreseen, and others, with how many of each came."""

    foreseen: int
    foreseen_better: int
    others: int
    others_better: int


class KindSummary(TypedDict):
    """The tasks of one kind."""

    n_tasks: int
    means: dict[str, float]
    gain: MeanOverTasks
    better: int
    no_difference_shown: int
    worse: int
    minutes: float
    better_of: NotRequired[list[str]]  # headings of the opponents, where there are several
    gain_over_better_base: NotRequired[MeanOverTasks]
    no_label_share: NotRequired[dict[str, float]]
    label_distance: NotRequired[dict[str, float]]
    forecasts: NotRequired[Foreseen]  # where runs have a forecast


class Results(TypedDict):
    """results.json of a bench."""

    tasks: list[BenchRow]
    summary: dict[str, KindSummary]
    failed: dict[str, str]
    ablations: NotRequired[list[AblationRow]]
    ablations_summary: NotRequired[dict[str, SwitchSummary]]
    seeds: NotRequired[Seeds]


def row_of(evaluation: Evaluation, manifest: Mapping[str, Any]) -> BenchRow:
    """A task's row from its run's evaluation.json and manifest.json. Raises SgLocalError where they are older."""
    contenders, metric = evaluation["contenders"], METRICS[evaluation["metric"]]
    is_classification = metric.judges == CLASSIFICATION
    for contender in Contender:
        if contender.is_expected(with_labels=is_classification) and contender not in contenders:
            raise SgLocalError(
                f"evaluation.json has no {contender}: run `sg-local evaluate RUN --redo` on it"
            )
    row: dict[str, object] = {
        "task": evaluation["task"],
        "kind": metric.judges,
        "n_rows": evaluation["n_rows"],
        "minutes": round(sum(entry["seconds"] for entry in manifest["stages"].values()) / 60, 1),
        **_types(manifest["stages"].get("export", {})),
        "scores": {
            contender: metric_mean(contenders[contender], metric)["mean"]
            for contender in Contender
            if contender in contenders
        },
        "gain": evaluation["gain"],
        "gain_over_best": gain_over_best(evaluation),
    }
    row |= {opponent.gain_key: gain for opponent, gain in gains(evaluation).items()}
    if is_classification:
        compared = (BASELINE, TUNED)
        row["no_label_share"] = {name: contenders[name]["no_label_share"] for name in compared}
        row["label_distance"] = {name: contenders[name]["label_distance"] for name in compared}
        for entry in ("agreement", "forecast"):
            row[entry] = manifest["stages"].get("curate", {}).get(entry)
    return cast(BenchRow, row)


def summary(rows: Sequence[BenchRow]) -> dict[str, KindSummary]:
    """For each kind of task: means of the columns, mean gains with their interval over tasks, and the verdicts."""
    return {
        kind: _kind_summary(kind, rows_of_kind)
        for kind in METRIC_OF_KIND
        if (rows_of_kind := [row for row in rows if row["kind"] == kind])
    }


def markdown(rows: Sequence[BenchRow], failed: Mapping[str, str]) -> str:
    """The table, a part for each kind of task, and under it the tasks that did not finish."""
    lines = []
    for kind, totals in summary(rows).items():
        lines += [f"### {kind.capitalize()}: {METRIC_OF_KIND[kind].heading}", ""]
        lines += _table([row for row in rows if row["kind"] == kind], totals)
        lines += ["", in_words(totals), ""]
    lines += _type_lines(rows)
    for task, reason in sorted(failed.items()):
        lines.append(f"- {text(task)} is not finished: {text('; '.join(reason.splitlines()))}")
    return "\n".join(lines).strip() + "\n" if lines else "no task is finished\n"


def results_markdown(results: Results) -> str:
    """What results.json holds, as tables."""
    table = markdown(results["tasks"], results["failed"])
    compared = ablation.markdown(results.get("ablations", []))
    return f"{table}\n{compared}".rstrip("\n") + "\n"


def _types(export: Mapping[str, Any]) -> dict[str, str]:
    """The types of the merged file, and that of the base where it was too coarse (stages/export.py)."""
    entries = {"merged_type": "parity", "too_coarse": "too_coarse"}
    types = {key: export[entry]["merged_type"] for key, entry in entries.items() if entry in export}
    _, _, finer = export.get("made_in", "").partition("+")  # "base+Q8_0"; merged_type is the coarsest one
    if finer:
        types["merged_type"] += f" and {finer}"
    return types


def _kind_summary(kind: str, rows: Sequence[BenchRow]) -> KindSummary:
    verdicts = [row["gain_over_best"]["verdict"] for row in rows]
    columns = [contender for contender in Contender if any(contender in row["scores"] for row in rows)]
    totals: KindSummary = {
        "n_tasks": len(rows),
        "means": {contender: average([score_of(row, contender) for row in rows]) for contender in columns},
        "gain": mean_over_tasks([row["gain"]["mean"] for row in rows]),
        "better": verdicts.count(Verdict.BETTER),
        "no_difference_shown": verdicts.count(Verdict.NO_DIFFERENCE),
        "worse": verdicts.count(Verdict.WORSE),
        "minutes": round(sum(row["minutes"] for row in rows), 1),
    }
    opponents = [column.heading for column in columns if column in OPPONENTS]
    if len(opponents) > 1:
        totals["better_of"] = opponents
        totals["gain_over_better_base"] = mean_over_tasks([row["gain_over_best"]["mean"] for row in rows])
    if kind == CLASSIFICATION:
        compared = (BASELINE, TUNED)
        totals["no_label_share"] = {
            name: average([row["no_label_share"][name] for row in rows]) for name in compared
        }
        totals["label_distance"] = {
            name: average([row["label_distance"][name] for row in rows]) for name in compared
        }
        if forecasts := _forecasts(rows):
            totals["forecasts"] = forecasts
    return totals


def _forecasts(rows: Sequence[BenchRow]) -> Foreseen | None:
    """How often what was foreseen came; None where nothing was."""
    verdicts = [
        (forecast["verdict"] == Verdict.BETTER, row["gain"]["verdict"] == Verdict.BETTER)
        for row in rows
        if (forecast := row.get("forecast"))
    ]
    came = [is_better for is_foreseen, is_better in verdicts if is_foreseen]
    others = [is_better for is_foreseen, is_better in verdicts if not is_foreseen]
    if not verdicts:
        return None
    return {
        "foreseen": len(came),
        "foreseen_better": sum(came),
        "others": len(others),
        "others_better": sum(others),
    }


def _type_lines(rows: Sequence[BenchRow]) -> list[str]:
    """Which merged files have another type than the base."""
    return [
        f"- {text(row['task'])}: model.gguf is {text(row['merged_type'])}, as {text(row['too_coarse'])} was too coarse "
        "for what was trained"
        for row in rows
        if "too_coarse" in row
    ]


def _table(rows: Sequence[BenchRow], totals: KindSummary) -> list[str]:
    columns = [contender for contender in Contender if contender in totals["means"]]
    has_labels = "no_label_share" in totals
    heads = ["task", *(contender.heading for contender in columns), "gain over few-shot [95 %]"]
    heads += ["gain over the base's best [95 %]", "p", "verdict"]
    heads += ["no label", "label distance", "as asked (chance)"] if has_labels else []
    lines = tables.markdown_heads([*heads, "minutes"])
    for row in rows:
        best = row["gain_over_best"]
        cells = [row["task"], *(tables.score(score_of(row, contender)) for contender in columns)]
        cells += [_gain(row["gain"]), _gain(best), tables.p_value(best["p"]), best["verdict"]]
        if has_labels:
            cells += [*_before_and_after(row), _agreement(row["agreement"])]
        lines.append(tables.markdown_row([*cells, f"{row['minutes']:.0f}"]))
    cells = ["mean", *(tables.score(totals["means"][contender]) for contender in columns)]
    cells += [_gain(totals["gain"]), _gain(totals.get("gain_over_better_base", totals["gain"])), "", ""]
    cells += [*_before_and_after(totals), ""] if has_labels else []
    minutes = f"{totals['minutes'] / totals['n_tasks']:.0f}"
    return [*lines, tables.markdown_row([*cells, minutes], is_total=True)]


def _before_and_after(row: BenchRow | KindSummary) -> list[str]:
    """Answers that are no label, and the distance from the truth's labels: of the base -> of the tuned model."""
    shares, distances = row["no_label_share"], row["label_distance"]
    return [
        f"{tables.share(shares[BASELINE])} → {tables.share(shares[TUNED])}",
        f"{distances[BASELINE]:.2f} → {distances[TUNED]:.2f}",
    ]


def _agreement(agreement: Agreement | None) -> str:
    return f"{agreement['share']:.0%} ({agreement['chance']:.0%})" if agreement else ""


def in_words(totals: KindSummary) -> str:
    n_tasks = totals["n_tasks"]
    text = f"{n_tasks} task{'s' * (n_tasks != 1)}, against the base's best way: {totals['better']} {Verdict.BETTER}, "
    text += f"{totals['no_difference_shown']} {Verdict.NO_DIFFERENCE}, {totals['worse']} {Verdict.WORSE}. "
    text += f"Mean gain over few-shot {_gain(totals['gain'])}"
    if "gain_over_better_base" in totals:
        *others, last = totals["better_of"]
        gain = _gain(totals["gain_over_better_base"])
        text += f", over the best of {', '.join(others)} and {last} {gain}"
    text += " (95 % interval over tasks)." if n_tasks > 1 else "."
    if forecasts := totals.get("forecasts"):
        text += (
            f" A gain over few-shot was foreseen in {forecasts['foreseen']} and came in "
            f"{forecasts['foreseen_better']}; of the {forecasts['others']} others {forecasts['others_better']} gained."
        )
    return text


def score_of(row: BenchRow, contender: Contender) -> float:
    """Few-shot answers of one line are what they are when they are cut at its end."""
    scores = row["scores"]
    if contender == Contender.FIRST_LINE and contender not in scores:
        contender = Contender.FEW_SHOT
    return scores[contender]


def _gain(gain: Gain | MeanOverTasks) -> str:
    return tables.gain(gain["mean"], gain["interval_95"])
